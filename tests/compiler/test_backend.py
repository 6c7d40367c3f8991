"""The backend as a user meets it: by name, in every phase, with every way to fail, and what it writes and says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from models import ALL_TARGETS, DecoderConfig, Fp64Decoder, batch, fp64_decoder, gradients, tiny_llama, with_lora
from oracle import Step, assert_differs, assert_same_step, kept_from, oracle_step, sparse_step, told, train_step
from sparse_compile import token_roles
from sparse_compile.compiler import executable
from sparse_compile.kernels.channel_selection import degenerate_counts, record_channels
from sparse_compile.passes.sparse.insert_predictors import InsertPredictors
from sparse_compile.passes.sparse.sparsify_ffn import SparsifyFFN
from sparse_compile.training.session import session_for

SITES = {"layers.0.mlp": 0.75, "layers.0.self_attn": 0.5}


def compiled(model: Any, dynamic: bool | None = False, **options: Any) -> Any:
    return torch.compile(model, backend="sparselora", dynamic=dynamic, options={"layer_sparsity": SITES, **options})


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


# --- By name ----------------------------------------------------------------------------------------------------------

BY_NAME = """
import sys
import torch
from torch import nn
from torch.nn import functional as F

# What Inductor makes of a graph is tested elsewhere: here it runs as it is.
import torch._inductor.compile_fx as inductor
inductor.compile_fx = lambda gm, *_, **__: (ran.append(gm), gm.forward)[1]
ran = []

assert "sparselora" in torch._dynamo.list_backends()
assert not any(name.split(".")[0] == "sparse_compile" for name in sys.modules), "found without an import"
torch.manual_seed(0)
weight = nn.Parameter(torch.randn(4, 4))

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return F.linear(x, self.weight).square().mean()

def function(x):
    return F.linear(x, weight).square().mean()

x = torch.randn(3, 4)
expected, = torch.autograd.grad(function(x), weight)
in_place = Model()
in_place.compile(backend="sparselora")
ways = in_place, torch.compile(Model(), backend="sparselora"), torch.compile(function, backend="sparselora")
for way in ways:
    torch._dynamo.reset()
    torch.testing.assert_close(torch.autograd.grad(way(x), weight)[0], expected)
assert not torch._dynamo.utils.counters["graph_break"]
assert len(ran) == 3, ran
assert "sparse_compile.compiler.backend" in sys.modules
print("every way agrees")
"""


@pytest.mark.slow
def test_registered_by_name_without_an_import() -> None:
    result = subprocess.run([sys.executable, "-c", BY_NAME], capture_output=True, text=True, check=False)
    assert "every way agrees" in result.stdout, result.stderr


@pytest.mark.slow
def test_a_model_compiled_in_place_and_a_plain_function(aot_eager_inductor: Any) -> None:
    model = fp64_decoder(layers=2)
    inputs = batch(61)

    def function(input_ids: Tensor, labels: Tensor) -> Tensor:
        return 2 * model(input_ids, labels=labels)[0]

    call = compiled(function)
    with record_channels() as record:
        call(**inputs).backward()
    doubled = gradients(model)
    assert record
    model.compile(backend="sparselora", dynamic=False, options={"layer_sparsity": SITES})
    step, kept = sparse_step(model, model, inputs)
    assert kept.keys() == SITES.keys()
    torch.testing.assert_close(doubled, {name: 2 * g for name, g in step.gradients.items()}, rtol=1e-9, atol=1e-12)
    assert aot_eager_inductor.sparse == [True, True]


# --- Through Inductor -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_zero_plan_is_bit_equal_to_inductor() -> None:
    model = with_lora(tiny_llama(layers=1), ("q_proj", "down_proj"))
    inputs = batch(97, padding="left")
    found = {}
    for name, options in (("inductor", None), ("sparselora", {"preset": "none"})):
        torch._dynamo.reset()
        call = torch.compile(model, backend=name, dynamic=False, options=options, fullgraph=True)
        result = call(**inputs)
        result.loss.backward()
        found[name] = {"loss": result.loss.detach(), "logits": result.logits.detach(), **gradients(model)}
    for name, expected in found["inductor"].items():
        assert torch.equal(found["sparselora"][name], expected), name


@pytest.mark.slow
def test_inductor_compiles_the_sparse_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that are known at run time only, through C++: the compiled callable runs, at every split."""
    runs: list[bool] = []
    real = executable.compile_with_inductor

    def watched(gm: Any, *args: Any) -> Any:
        run = real(gm, *args)
        sparse = any("split_tokens" in str(node.target) for node in gm.graph.nodes)
        return lambda *inputs: (runs.append(sparse), run(*inputs))[1]

    monkeypatch.setattr(executable, "compile_with_inductor", watched)
    torch._dynamo.utils.counters.clear()
    model = Fp64Decoder(DecoderConfig(layers=1, dtype=torch.float32))
    # Of a single block the exact optimisations would take the feed-forward site over.
    options = {"layer_sparsity": SITES, "preset": "none"}
    call = torch.compile(model, backend="sparselora", dynamic=False, fullgraph=True, options=options)
    with told() as messages:
        for prompts in ([5, 9, 3], [0, 0, 0], [16, 2, 16]):
            inputs = batch(61, prompts=prompts)
            step, kept = sparse_step(model, call, inputs)
            assert kept.keys() == SITES.keys()
            assert_same_step(step, oracle_step(model, kept, inputs), torch.float32, what=str(prompts))
    assert messages == []
    assert runs == [True] * 3
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert not counters["unimplemented"]


# --- Dense where it must be -------------------------------------------------------------------------------------------


def test_evaluation_runs_dense_and_silent(eager_inductor: Any) -> None:
    model = fp64_decoder(layers=2)
    inputs = batch(61)
    call = compiled(model)
    with told() as messages, record_channels() as record:
        with torch.no_grad():
            loss, logits = call(**inputs)
        model.eval()
        with torch.inference_mode():
            call(input_ids=inputs["input_ids"])
    assert messages == []
    assert record == {}
    torch.testing.assert_close((loss, logits), model(**inputs), rtol=1e-12, atol=1e-12)
    assert eager_inductor.sparse == [False, False]
    # And training afterwards is sparse.
    assert sparse_step(model, call, inputs)[1].keys() == SITES.keys()


def test_generate_runs_dense_and_silent(eager_inductor: Any) -> None:
    model = with_lora(tiny_llama(layers=2))
    prompt = batch(97, rows=2, length=5)["input_ids"]
    expected = model.generate(input_ids=prompt, max_new_tokens=3, do_sample=False)
    model.compile(backend="sparselora", options={"layer_sparsity": SITES})
    with told() as messages, record_channels() as record:
        generated = model.generate(input_ids=prompt, max_new_tokens=3, do_sample=False)
        model.get_base_model().compile(backend="sparselora", options={"layer_sparsity": SITES})
        with torch.no_grad():
            model(input_ids=prompt)
    assert torch.equal(generated, expected)
    assert messages == []
    assert record == {}
    assert not any(eager_inductor.sparse)


# --- Schedule ---------------------------------------------------------------------------------------------------------


def test_phases_switch_by_optimizer_steps_in_one_graph(aot_eager_inductor: Any) -> None:
    model = fp64_decoder(layers=2)
    inputs = batch(61)
    call = compiled(model, start_step=2, end_step=4)
    optimizer, degenerate = torch.optim.AdamW(trained(model), lr=1e-2), degenerate_counts()
    for step in range(6):
        with record_channels() as record:
            loss = call(**inputs)[0]
            loss.backward()
        actual = Step(loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        gradients(model)
        assert bool(record) == (step in (2, 3)), step
        kept = kept_from({name: choices[0] for name, choices in record.items()})
        expected = oracle_step(model, kept, inputs)
        assert_same_step(actual, expected, torch.float64, what=f"step {step}")
        if record:
            assert_differs(actual, oracle_step(model, {}, inputs))
        for name, parameter in model.named_parameters():
            parameter.grad = actual.gradients.get(name)
        optimizer.step()
        optimizer.zero_grad()
    assert aot_eager_inductor.sparse == [True]
    assert aot_eager_inductor.runs == [6]
    assert degenerate_counts() == degenerate, "a dense step has no scores, and no fault in them"


def test_a_backward_belongs_to_the_phase_of_its_forward(aot_eager_inductor: Any) -> None:
    """Steps may be taken between a forward and its backward: gradients are those of the function that was computed."""
    model = fp64_decoder(layers=2)
    inputs = batch(61)
    call = compiled(model, start_step=1, end_step=2)
    schedule = session_for(trained(model)).schedule
    for step, moved_to in ((0, 1), (1, 2)):
        schedule.step = step
        with record_channels() as record:
            loss = call(**inputs)[0]
        schedule.step = moved_to
        loss.backward()
        kept = kept_from({name: choices[0] for name, choices in record.items()})
        assert bool(kept) == (step == 1)
        actual = Step(loss.detach(), gradients(model))
        assert_same_step(actual, oracle_step(model, kept, inputs), torch.float64, what=f"step {step}")
    assert aot_eager_inductor.runs == [2]


# --- When something fails ---------------------------------------------------------------------------------------------


def broken(*_: Any) -> Any:
    raise RuntimeError("broken on purpose")


@pytest.mark.parametrize(("failing", "sparse"), [(InsertPredictors, False), (SparsifyFFN, True)])
def test_an_approximate_pass_that_raises_is_left_out_with_one_warning(
    failing: Any, sparse: bool, monkeypatch: pytest.MonkeyPatch, eager_inductor: Any
) -> None:
    """Without predictors the graph is dense; without one kind of site, the other is sparse."""
    model = fp64_decoder(layers=2)
    inputs = batch(61)
    expected = train_step(model, compiled(model, disable=[failing.name]), inputs)
    torch._dynamo.reset()
    monkeypatch.setattr(failing, "run", broken)
    call = compiled(model)
    with told() as messages:
        step = train_step(model, call, inputs)
        train_step(model, call, inputs)
    assert_same_step(step, expected, torch.float64)
    assert len(messages) == 1, messages
    assert all(part in messages[0] for part in (failing.name, "RuntimeError: broken on purpose", "dense"))
    assert eager_inductor.sparse == [sparse, sparse]
    assert eager_inductor.runs == [1, 2]


def test_a_pass_that_raises_raises_when_strict(monkeypatch: pytest.MonkeyPatch, eager_inductor: Any) -> None:
    monkeypatch.setattr(SparsifyFFN, "run", broken)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="broken on purpose"):
        compiled(fp64_decoder(layers=2), strict=True)(**batch(61))


def _dynamic_output() -> Exception:
    return torch._subclasses.fake_tensor.DynamicOutputShapeException(torch.ops.aten.nonzero.default)


def _unsupported_operator() -> Exception:
    return torch._subclasses.fake_tensor.UnsupportedOperatorException(torch.ops.aten.nonzero.default)


@pytest.mark.parametrize(
    "error",
    # Dynamo takes the last two for a graph break, which would run the frame eagerly and say nothing.
    [lambda: RuntimeError("no compiler"), _dynamic_output, _unsupported_operator],
    ids=["RuntimeError", "DynamicOutputShapeException", "UnsupportedOperatorException"],
)
def test_where_inductor_fails_on_the_sparse_graph_the_dense_one_runs(
    error: Any, monkeypatch: pytest.MonkeyPatch, eager_inductor: Any
) -> None:
    def failing(gm: Any, *args: Any) -> Any:
        if any("sparselora" in str(node.target) for node in gm.graph.nodes):
            raise error()
        return eager_inductor(gm, *args)

    monkeypatch.setattr(executable, "compile_with_inductor", failing)
    model = fp64_decoder(layers=2)
    inputs = batch(61)
    with told() as messages:
        step = train_step(model, compiled(model), inputs)
    assert_same_step(step, train_step(model, model, inputs), torch.float64)
    assert len(messages) == 1, messages
    assert "did not compile" in messages[0] and type(error()).__name__ in messages[0]
    assert eager_inductor.runs == [1]


def test_a_pass_that_is_disabled_does_not_run(eager_inductor: Any) -> None:
    model = fp64_decoder(layers=2)
    inputs = batch(61)
    step, kept = sparse_step(model, compiled(model, disable=["sparsify_ffn"]), inputs)
    attention = {"layers.0.self_attn": kept["layers.0.self_attn"]}
    assert_same_step(step, oracle_step(model, attention, inputs), torch.float64)
    (report,) = session_for(trained(model)).reports
    skipped = {each.record.name: each.record.skipped for each in report.passes if each.record.skipped}
    assert skipped == {"sparsify_ffn": "disabled"}


# --- Dumps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["option", "environment"])
def test_dumps(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eager_inductor: Any) -> None:
    options = {"dump_dir": str(tmp_path / "dump")} if how == "option" else {}
    if how == "environment":
        monkeypatch.setenv("SPARSELORA_DUMP", str(tmp_path / "dump"))
    model = fp64_decoder(layers=2)
    sparse_step(model, compiled(model, **options), batch(61))
    (folder,) = (tmp_path / "dump").iterdir()
    texts = sorted(path.name for path in folder.glob("*.txt"))
    assert texts[0] == "00_captured.txt"
    assert [name[:2] for name in texts] == [f"{i:02d}" for i in range(len(texts))]
    assert "layers.0.mlp.up_proj" in (folder / "00_captured.txt").read_text()
    assert "sparselora" not in (folder / "00_captured.txt").read_text()
    assert "sparselora.gathered_linear" in (folder / texts[-1]).read_text()
    plan = json.loads((folder / "plan.json").read_text())
    assert {each["site"]["name"]: each["kept"] for each in plan["sites"]} == {
        "layers.0.mlp": 12,
        "layers.0.self_attn": 8,
        "layers.1.mlp": 48,
        "layers.1.self_attn": 16,
    }
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["flops_after"] < manifest["flops_before"]
    assert {"lower_sparse_ops", "lower_frozen_linears"} <= {each["record"]["name"] for each in manifest["passes"]}
    everything = "".join(path.read_text() for path in folder.iterdir())
    assert str(tmp_path) not in everything
    assert not re.search(r"0x[0-9a-f]{6}", everything)


# --- Roles without a loss in the graph --------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["labels", "output_mask"])
def test_given_roles_equal_those_of_a_loss_inside_the_graph(given: str, eager_inductor: Any) -> None:
    model = fp64_decoder(layers=2)
    inputs = batch(61, padding="left")
    labels = inputs["labels"]
    inside, kept = sparse_step(model, compiled(model), inputs)
    torch._dynamo.reset()
    call = compiled(model)

    def outside(**_: Tensor) -> tuple[Tensor]:
        if given == "labels":
            roles = token_roles(labels=labels)
        else:
            mask = labels != -100
            mask[:, :-1] |= labels[:, 1:] != -100
            roles = token_roles(output_mask=mask)
        with roles:
            logits = call(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])[1]
        return (F.cross_entropy(logits[:, :-1].reshape(-1, 61), labels[:, 1:].reshape(-1)),)

    step, kept_outside = sparse_step(model, outside, inputs)
    torch.testing.assert_close(kept_outside, kept)
    assert_same_step(step, inside, torch.float64)
    assert session_for(trained(model)).reports[-1].roles == "given"


class WithoutLoss(nn.Module):
    """Returns logits, and a mask that it makes from labels: what TRL's chunked loss leaves in the first graph."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self.model(input_ids)[1], labels[:, 1:] != -100


def test_labels_that_the_graph_only_compares_tell_the_roles(eager_inductor: Any) -> None:
    model = WithoutLoss(fp64_decoder(layers=2))
    inputs = batch(61)
    call = compiled(model)

    def with_loss(input_ids: Tensor, labels: Tensor) -> tuple[Tensor]:
        logits, counted = call(input_ids, labels)
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
        return (losses[counted].mean(),)

    step, kept = sparse_step(model, with_loss, inputs)
    assert kept.keys() == {f"model.{site}" for site in SITES}
    expected = oracle_step(model, kept, inputs, call=model.model)
    assert_same_step(step, expected, torch.float64)
    assert session_for(trained(model)).reports[-1].roles == "labels"


# --- Trainer ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_trainer_with_the_callback(tmp_path: Path, aot_eager_inductor: Any) -> None:
    from transformers import Trainer, TrainingArguments

    from sparse_compile import SparseLoRACallback

    model = with_lora(tiny_llama(layers=2), ALL_TARGETS)
    rows = batch(97, rows=8, length=12)
    dataset = [{name: values[i] for name, values in rows.items()} for i in range(8)]
    model.compile(backend="sparselora", options={"layer_sparsity": SITES, "start_step": 0.33, "strict": True})
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
        save_strategy="no", logging_steps=1, disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=dataset, callbacks=[SparseLoRACallback()])
    with told() as messages, record_channels() as record:
        trainer.train()
    assert messages == []
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and all(0 < loss < 20 for loss in losses)
    # 0.33 of three steps is 0.99, rounded up: one dense step, two sparse ones.
    assert {name: len(choices) for name, choices in record.items() if name.endswith("mlp")} == {
        "base_model.model.model.layers.0.mlp": 2
    }
    assert aot_eager_inductor.sparse == [True]
    assert aot_eager_inductor.runs == [3]
    session = session_for(trained(model))
    assert session.schedule.total_steps == 3
    (report,) = session.reports
    assert {site.name for site in report.sites if site.sparsity} == {f"base_model.model.model.{site}" for site in SITES}


# --- Several models ---------------------------------------------------------------------------------------------------


def test_two_models_of_one_class_share_no_graph(eager_inductor: Any) -> None:
    """A sparse graph holds the predictor of one model's weights and follows one model's schedule."""
    inputs = batch(61)
    models = [fp64_decoder(layers=2, seed=seed) for seed in (0, 1)]
    calls = [compiled(model, start_step=1) for model in models]
    for model, call in zip(models, calls, strict=True):
        optimizer = torch.optim.SGD(trained(model), lr=1e-3)
        for step in range(2):
            with record_channels() as record:
                call(**inputs)[0].backward()
            assert bool(record) == (step == 1)
            optimizer.step()
            optimizer.zero_grad()
    # Each keeps to its own graphs when they take turns.
    for model, call in zip(models, calls, strict=True):
        step, kept = sparse_step(model, call, inputs)
        alone = fp64_decoder(layers=2, seed=model.config.seed)
        alone.load_state_dict(model.state_dict())
        torch._dynamo.reset()
        torch.testing.assert_close(kept, sparse_step(alone, compiled(alone), inputs)[1])
        assert_same_step(step, oracle_step(model, kept, inputs), torch.float64)
    assert [session_for(trained(model)).schedule.step for model in models] == [2, 2]
