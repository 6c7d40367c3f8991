"""What users are told of a model that was compiled: what they asked for and have not, and what their run does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

from models import DecoderConfig, batch, fp64_decoder
from oracle import told, train_step
from sparse_compile import Schedule, token_roles
from sparse_compile.compiler.report import SiteReport
from sparse_compile.graph.cost import Gain
from sparse_compile.passes.roles import plan_sparsity
from sparse_compile.training.session import session_for
from sweeps import slow


def pays_for(kinds: tuple[str, ...]) -> Any:
    """Have sites of these kinds pay, and no others."""
    return lambda site, *_: Gain(442_411.0, 442_368.0) if site.kind in kinds else Gain(442_368.0, 442_411.0)


def warnings_of_a_step(options: dict[str, Any]) -> tuple[list[str], list[SiteReport]]:
    """Compile a model, run two steps, and return what was told, and the sites."""
    model = fp64_decoder(layers=4)
    model.compile(backend="sparselora", options=options)
    with told() as messages:
        for _ in range(2):
            model(**batch(61))[0].backward()
    (report,) = session_for([each for each in model.parameters() if each.requires_grad]).reports
    return messages, report.sites


# --- What the run does ------------------------------------------------------------------------------------------------

SITES = {"0.mlp": 0.5, "2.self_attn": 0.5}


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect the lines that are shown."""
    lines: list[str] = []
    monkeypatch.setattr("sparse_compile.compiler.run_notices.say", lines.append)
    return lines


def train(model: nn.Module, steps: int) -> None:
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    for _ in range(steps):
        model(**batch(61))[0].backward()
        optimizer.step()


@pytest.mark.usefixtures("default_start", "eager_inductor")
@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, "sparse from step 20 (the length of the run is not known; to choose: start_step=..., "),
        slow({"start_step": 0}, "sparse from step 0"),
        ({"start_step": 2, "end_step": 9}, "sparse from step 2 to step 8"),
        slow({"schedule": Schedule(100)}, "sparse from step 5"),
        slow({"end_step": 5, "schedule": Schedule(200)}, "but no step of the run is sparse"),
    ],
)
def test_a_run_says_what_it_does(options: dict[str, Any], steps: str, said: list[str]) -> None:
    model = fp64_decoder()
    model.compile(backend="sparselora", options={"layer_sparsity": SITES, **options})
    train(model, 2)
    (line,) = said
    (report,) = session_for([each for each in model.parameters() if each.requires_grad]).reports
    assert f"{report.flops_after / report.flops_before - 1:.0%}" == line.split(", ")[1].split()[0]
    assert line.startswith("2 of 6 sites sparse, -") and f" FLOPs of a step, {steps}" in line
    assert line.endswith(steps) or not options


def test_a_model_whose_blocks_are_compiled_one_by_one_says_it_in_one_line(eager_inductor: Any, said: list[str]) -> None:
    model = fp64_decoder()
    for block in model.layers:
        block.compile(backend="sparselora", options={"layer_sparsity": SITES, "start_step": 0})
    for _ in range(3):
        with token_roles(labels=batch(61)["labels"]):
            train(model, 1)
    assert [line.split(", ")[0] for line in said] == ["2 of 6 sites sparse"]


@pytest.mark.parametrize("preset", [slow("none"), "exact"])
def test_nothing_is_said_where_nothing_was_to_be_sparse(preset: str, said: list[str], eager_inductor: Any) -> None:
    model = fp64_decoder()
    model.compile(backend="sparselora", options={"preset": preset})
    train(model, 1)
    with torch.no_grad():
        model(**batch(61))
    assert said == []


def test_a_model_of_which_every_weight_trains_is_told_what_is_missing(eager_inductor: Any) -> None:
    model = fp64_decoder(layers=1).requires_grad_(True)
    model.compile(backend="sparselora", options={"preset": "o1"})
    with told() as messages:
        model(**batch(61))[0].backward()
    (message,) = messages
    assert message.endswith("Declined:\n  all weights are trained: this needs frozen layers with adapters (LoRA)")


@pytest.mark.slow
def test_where_the_sparse_graph_does_not_compile_nothing_is_said_of_it(
    said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(gm: fx.GraphModule, *_: Any) -> Any:
        if any("split_tokens" in str(node.target) for node in gm.graph.nodes):
            raise RuntimeError("no kernel for this")
        return gm.forward

    monkeypatch.setattr("sparse_compile.compiler.executable.compile_with_inductor", failing)
    model = fp64_decoder()
    model.compile(backend="sparselora", options={"layer_sparsity": SITES})
    with pytest.warns(UserWarning, match="did not compile"):
        train(model, 1)
    assert said == []


@pytest.mark.slow
@pytest.mark.usefixtures("default_start")
def test_a_graph_of_fixed_sizes_is_told_of_when_it_is_sparse(eager_inductor: Any, said: list[str]) -> None:
    model = fp64_decoder()
    model.compile(backend="sparselora", options={"layer_sparsity": SITES, "token_capacity": 30})
    said_at = []
    for step in range(21):
        train(model, 1)
        said_at += [step] * (len(said) - len(said_at))
    assert said_at == [20]
    assert said[0].startswith("2 of 6 sites sparse, -") and eager_inductor.runs == [20, 1]


def test_a_model_that_trains_in_evaluation_mode_is_told_of_once(eager_inductor: Any, said: list[str]) -> None:
    model = fp64_decoder()
    model.compile(backend="sparselora", options={"preset": "exact"})
    train(model, 1)
    with torch.no_grad():
        model.eval()(**batch(61))
    assert said == []
    train(model, 2)
    assert len(eager_inductor.graphs) == 2, "no other compilation than that of the evaluation"
    (line,) = said
    assert "eval mode" in line and "model.train()" in line


# --- Sites that do not pay --------------------------------------------------------------------------------------------


def test_a_preset_site_that_does_not_pay_is_a_line_of_the_report_and_no_warning(
    monkeypatch: pytest.MonkeyPatch, eager_inductor: Any
) -> None:
    monkeypatch.setattr(plan_sparsity, "gain", pays_for(("ffn",)))
    messages, sites = warnings_of_a_step({"preset": "o2"})
    assert messages == [] and eager_inductor.sparse[0]
    reasons = {site.reason for site in sites if site.name == "layers.2.self_attn"}
    assert reasons == {"saves 4.4237e+05 FLOPs a token and costs the time of 4.4241e+05"}


def test_where_nothing_pays_the_warning_names_the_reason(monkeypatch: pytest.MonkeyPatch, eager_inductor: Any) -> None:
    monkeypatch.setattr(plan_sparsity, "gain", pays_for(()))
    (message,), _ = warnings_of_a_step({"preset": "o2"})
    assert "preset 'o2' asks for sparsity and no site became sparse" in message
    assert "saves 4.4237e+05 FLOPs a token and costs the time of 4.4241e+05" in message
    assert not any(eager_inductor.sparse)


@pytest.mark.slow
def test_what_else_keeps_a_preset_site_dense_is_a_warning(monkeypatch: pytest.MonkeyPatch, eager_inductor: Any) -> None:
    monkeypatch.setattr(plan_sparsity, "gain", pays_for(("ffn", "attention")))
    model = fp64_decoder(layers=4)
    weight = model.layers[1].mlp.up_proj.base_layer.weight
    weight.data[0, 0] = float("nan")
    model.compile(backend="sparselora", options={"preset": "o2"})
    with told() as messages:
        model(**batch(61))
    (message,) = messages
    assert "sites that were asked for stay dense" in message and "is not finite" in message


@pytest.mark.usefixtures("eager_inductor")
def test_a_run_says_where_context_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("sparse_compile.compiler.run_notices.say", said.append)
    options = {"layer_sparsity": {}, "context_exit": 0.5, "strict": True}
    model = fp64_decoder(layers=4)
    train_step(model, torch.compile(model, backend="sparselora", options=options), batch(DecoderConfig().vocab))
    assert said[0].startswith("3 of 8 sites sparse, context leaves before layers.2.self_attn, -")


@pytest.mark.usefixtures("eager_inductor")
def test_context_that_was_asked_to_leave_and_stays_is_told_once_with_the_reason() -> None:
    options = {"layer_sparsity": {}, "context_exit": 0.5, "keep_logits": True}
    model = fp64_decoder(layers=4)
    call = torch.compile(model, backend="sparselora", options=options)
    with pytest.warns(UserWarning, match="do not leave the residual stream.*keep_logits") as told:
        train_step(model, call, batch(DecoderConfig().vocab))
    assert len([each for each in told if "do not leave" in str(each.message)]) == 1
    train_step(model, call, batch(DecoderConfig().vocab, seed=1))
