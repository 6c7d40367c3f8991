"""`explain` says what the backend would do, and runs nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from graphs import MLP, PASS_NAMES, Head, lora, tokens
from models import batch, fp64_decoder, tiny_llama, with_lora
from sparse_compile import Schedule, SparseLoRAConfig, explain
from sparse_compile.compiler.report import Report
from sparse_compile.compiler.report_text import graph_text

SITES = {"1.mlp": 0.75, "2.mlp": 0.5, "2.self_attn": 0.5}


def report_of(**options: Any) -> Report:
    return explain(fp64_decoder(), **batch(61), config=options)


def test_sites_and_tokens() -> None:
    inputs = batch(61)
    report = explain(fp64_decoder(), **inputs, config=SparseLoRAConfig(layer_sparsity=SITES))
    assert [site.name for site in report.sites] == [
        f"layers.{i}.{kind}" for i in range(3) for kind in ("self_attn", "mlp")
    ]
    by_name = {site.name: site for site in report.sites}
    mlp, attention = by_name["layers.1.mlp"], by_name["layers.2.self_attn"]
    assert (mlp.kind, mlp.sparsity, mlp.kept, mlp.total, mlp.adapters) == ("ffn", 0.75, 12, 48, 3)
    assert (attention.kind, attention.sparsity, attention.kept, attention.total) == ("attention", 0.5, 8, 16)
    assert by_name["layers.0.mlp"].provider == "dense" and mlp.provider == "cpu_index+cpu_gemm"
    (graph,) = report.graphs
    labelled = inputs["labels"] != -100
    output = labelled.clone()
    output[:, :-1] |= labelled[:, 1:]
    assert graph.tokens == (int((~output).sum()), int(output.sum()), int(labelled[:, 1:].sum()))
    assert [each.record.name for each in graph.passes] == list(PASS_NAMES)
    assert graph.roles == "cross_entropy"


def test_rejections_are_reported() -> None:
    report = explain(
        Head(MLP(), loss=lambda z, y: z.sum() + y.sum()), *tokens(), config={"layer_sparsity": {"body.0": 0.5}}
    )
    assert {rejection.rule for rejection in report.rejections} == {"trace_roles", "plan_sparsity", "select_loss_rows"}
    assert "nothing tells output tokens from context" in str(report)


@pytest.mark.slow
def test_flops_fall_with_sparsity() -> None:
    none, half, most = (report_of(layer_sparsity=dict.fromkeys(SITES, s)) for s in (0.0, 0.5, 0.9))
    dense, some, more = (report.flops_after for report in (none, half, most))
    assert dense > some > more
    report = report_of(layer_sparsity=SITES)
    assert report.flops_before > dense > report.flops_after > 0
    changes, exact = (
        {each.record.name: each.flops_after - each.flops_before for each in found.graphs[0].passes}
        for found in (report, none)
    )
    assert changes["insert_predictors"] > 0 > changes["sparsify_attention"] and changes["sparsify_ffn"] < 0
    # A layer of a sparse site keeps the order of its products.
    assert exact["order_adapter_products"] < changes["order_adapter_products"] < 0
    assert changes["select_loss_rows"] == pytest.approx(exact["select_loss_rows"])
    assert exact["select_loss_rows"] + exact["order_adapter_products"] == pytest.approx(dense - none.flops_before)
    assert sum(changes.values()) == pytest.approx(report.flops_after - report.flops_before)


def counted(model: nn.Module, *args: Any, **kwargs: Any) -> int:
    """FLOPs of the products with weights that eager executes, forward and backward."""
    counter = FlopCounterMode(display=False)
    with counter:
        result = model(*args, **kwargs)
        (result[0] if isinstance(result, tuple) else result).backward()
    counts = counter.get_flop_counts()["Global"]
    return sum(count for op, count in counts.items() if "mm" in str(op) and "bmm" not in str(op))


def test_flops_of_products_are_those_that_eager_executes() -> None:
    model, inputs = Head(MLP(), MLP()), tokens()
    assert explain(model, *inputs, config={"preset": "none"}).flops_before == counted(model, *inputs)


@pytest.mark.parametrize("adapters", [("q_proj",), ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")])
def test_flops_of_a_decoder_without_its_attention(adapters: tuple[str, ...]) -> None:
    """Attention is counted as a fused causal kernel runs it: half of the scores, 2 products forward and 5 backward."""
    model, inputs = fp64_decoder(adapters=adapters), batch(61, rows=3, length=16)
    c = model.config
    attention = c.layers * 4 * (3 * c.heads * 16 * c.head_dim) * 16 / 2 * (1 + 2.5)
    assert explain(model, **inputs, config={"preset": "none"}).flops_before - attention == counted(model, **inputs)


# --- Nothing is run ---------------------------------------------------------------------------------------------------


def test_parameters_gradients_and_generators_are_untouched() -> None:
    model = fp64_decoder()
    parameters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    state = torch.random.get_rng_state()
    explain(model, **batch(61), config={"layer_sparsity": SITES})
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, parameters[name]) and parameter.grad is None


def test_no_random_number_is_drawn() -> None:
    """An adapter's dropout would draw some, were the model run."""
    model, inputs = with_lora(tiny_llama(layers=1), dropout=0.5), batch(97)
    state = torch.random.get_rng_state()
    assert explain(model, **inputs, config={"preset": "none"}).sites
    assert torch.equal(torch.random.get_rng_state(), state)
    model(**inputs)
    assert not torch.equal(torch.random.get_rng_state(), state)


def test_a_model_compiled_in_place_stays_compiled() -> None:
    runs: list[int] = []

    def backend(gm: Any, example_inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            runs.append(1)
            return gm.forward(*args)

        return run

    model, inputs = fp64_decoder(), batch(61)
    model.compile(backend=backend)
    model(**inputs)
    compiled = model._compiled_call_impl
    assert explain(model, **inputs, config={"layer_sparsity": SITES}).sites
    assert model._compiled_call_impl is compiled and len(runs) == 1
    model(**inputs)
    assert len(runs) == 2


@pytest.mark.slow
def test_explain_answers_however_often_it_is_asked() -> None:
    """Each answer traces the model anew, and at its recompilation limit Dynamo would hand over no graph."""
    model = Head(nn.Sequential(lora(8, 12), nn.ReLU(), lora(12, 8)))
    reports = [explain(model, *tokens()) for _ in range(torch._dynamo.config.recompile_limit + 2)]
    assert {len(report.sites) for report in reports} == {1}


def test_explain_without_a_trained_parameter_is_empty() -> None:
    model = fp64_decoder().requires_grad_(False)
    report = explain(model, **batch(61))
    assert report.graphs == ()
    assert str(report).startswith(
        "Nothing was captured to train: no parameter that is trained takes part in it. Add an"
    )


def test_explain_turns_gradients_on() -> None:
    with torch.no_grad():
        assert report_of(layer_sparsity=SITES).sites


# --- Whose options ----------------------------------------------------------------------------------------------------

HALF = {"layer_sparsity": {"1.mlp": 0.5}}
MOST = {"layer_sparsity": {"1.mlp": 0.75}}


def sparse_sites(report: Report) -> dict[str, float]:
    return {site.name: site.sparsity for site in report.sites if site.sparsity}


@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_model_is_explained_with_its_own_options(in_place: bool) -> None:
    model = fp64_decoder()
    compiled = torch.compile(model, backend="sparselora", options=HALF)
    if in_place:
        model.compile(backend="sparselora", options=HALF)
        compiled = model
    report = explain(compiled, **batch(61))
    assert list(sparse_sites(report).values()) == [0.5]
    assert report.options == HALF and report.options_from == "the compiled model"
    assert "\noptions, from the compiled model: layer_sparsity={'1.mlp': 0.5}\n" in str(report)
    assert report.to_dict()["options"] == HALF


def test_options_that_are_given_win() -> None:
    model = fp64_decoder()
    model.compile(backend="sparselora", options=HALF)
    report = explain(model, **batch(61), config=MOST)
    assert list(sparse_sites(report).values()) == [0.75]
    assert (report.options, report.options_from) == (MOST, "config")


def test_a_model_that_was_compiled_with_another_backend_has_the_defaults() -> None:
    model = Head(MLP())
    model.compile(backend="inductor", options={"max_autotune": False})
    report = explain(model, *tokens())
    assert (report.options, report.options_from) == ({"preset": "o1"}, "the defaults")


@pytest.mark.parametrize(
    ("second", "said"),
    [(HALF, "the compiled parts"), (MOST, "the first compiled part (others have other options)")],
)
def test_blocks_that_were_compiled_one_by_one(second: dict[str, Any], said: str) -> None:
    model = fp64_decoder()
    for block, options in zip(model.layers, (HALF, second, second), strict=True):
        block.compile(backend="sparselora", options=options)
    report = explain(model, **batch(61))
    assert (report.options, report.options_from) == (HALF, said)
    assert [site.sparsity for site in report.sites if site.name.endswith("1.mlp")] == [0.5]


@pytest.mark.slow
def test_a_model_that_a_compiled_function_calls_has_the_options_of_its_session(eager_inductor: Any) -> None:
    model, inputs = fp64_decoder(), batch(61)
    schedule = Schedule(10)

    @torch.compile(backend="sparselora", options={**HALF, "schedule": schedule})
    def step() -> Tensor:
        return model(**inputs)[0]

    step()
    report = explain(model, **inputs)
    assert list(sparse_sites(report).values()) == [0.5]
    assert report.options_from == "the session of the model"
    assert report.to_dict()["options"]["schedule"] == repr(schedule), "JSON cannot hold a schedule"
    assert explain(step).options_from == "the compiled model"


# --- Several graphs ---------------------------------------------------------------------------------------------------


class Broken(nn.Module):
    """Two graphs: Dynamo cannot trace the call between the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = MLP(), MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


def test_several_graphs() -> None:
    report = explain(Head(Broken()), *tokens(), config={"layer_sparsity": {"second": 0.5}})
    assert len(report.graphs) >= 2
    # Dynamo names parameters from the frame that it goes on in.
    assert {site.name.split(".")[-1] for site in report.sites} == {"first", "second"}
    assert report.flops_before == sum(graph.flops_before for graph in report.graphs)
    assert any("nothing tells output tokens from context" in rejection.reason for rejection in report.rejections)


# --- The report -------------------------------------------------------------------------------------------------------


def test_dense_sites_have_a_reason() -> None:
    named = report_of(layer_sparsity={"1.mlp": 0.5, "2.mlp": 0.0, "1.self_attn": 0.01})
    assert {site.name: site.why_dense for site in named.sites} == {
        "layers.0.self_attn": "layer_sparsity does not name it",
        "layers.0.mlp": "layer_sparsity does not name it",
        "layers.1.self_attn": "a sparsity of 0.01 is less than one of its 16 channels",
        "layers.1.mlp": "",
        "layers.2.self_attn": "layer_sparsity does not name it",
        "layers.2.mlp": "layer_sparsity keeps it dense",
    }


@pytest.mark.parametrize(
    ("preset", "reasons"),
    [
        ("exact", ["preset 'exact' keeps every site dense"] * 4),
        (
            "o2",
            [
                "first block, always dense",
                "preset 'o2' has attention sparsity in blocks 2 to 2 of 4",
                "saves ",
                "last block, always dense",
            ],
        ),
        (
            "auto",
            [
                "first block, always dense",
                "preset 'auto' leaves attention dense in the blocks that context runs through",
                "",
                "",
            ],
        ),
    ],
)
def test_dense_sites_of_a_preset_have_a_reason(preset: str, reasons: list[str]) -> None:
    report = explain(fp64_decoder(layers=4), **batch(61), config={"preset": preset})
    found = [site.why_dense for site in report.sites if site.kind == "attention"]
    assert len(found) == len(reasons)
    for reason, expected in zip(found, reasons, strict=True):
        assert reason.startswith(expected) and bool(reason) == bool(expected)


def test_a_model_of_which_every_weight_trains_is_told_what_is_missing() -> None:
    report = explain(tiny_llama(layers=1), **batch(97))
    assert all(graph.all_trained for graph in report.graphs) and report.sites == ()
    needed = "all weights are trained: this needs frozen layers with adapters (LoRA)"
    assert str(report).startswith(f"No site can be sparse, because {needed}.\n")


def test_rejections_have_a_place_in_the_model() -> None:
    (graph,) = report_of(layer_sparsity=SITES).graphs
    (stopped,) = (each for each in graph.rejections if each.rule == "select_loss_rows")
    assert graph.places[stopped.node] == "layers.2.self_attn", "a node has the module that it was captured in"
    text = graph_text(graph)
    assert f"select_loss_rows: {stopped.reason} (layers.2.self_attn)" in text and stopped.node not in text


def test_save(tmp_path: Path) -> None:
    report = report_of(layer_sparsity=SITES)
    report.save(tmp_path / "report.json")
    report.save(tmp_path / "report.txt")
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["graphs"][0]["sites"][3]["name"] == "layers.1.mlp"
    assert data["flops_before"] == report.flops_before > data["flops_after"]
    assert (tmp_path / "report.txt").read_text() == str(report) + "\n"
    report.save(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text().startswith("<!DOCTYPE html>")
    for bad in ("report.pdf", "report"):
        with pytest.raises(ValueError, match=r"\.html, \.json or \.txt"):
            report.save(tmp_path / bad)


def test_bad_options_are_named() -> None:
    with pytest.raises(ValueError, match="presset"):
        explain(fp64_decoder(), **batch(61), config={"presset": "o1"})
