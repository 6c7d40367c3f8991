"""The context part of a sparse feed-forward block becomes fused products that compute what it computed."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from graphs import (
    ANALYSES,
    Captured,
    Head,
    assert_golden,
    assert_like_masked_dense,
    capture,
    frozen,
    lora,
    rejections,
    render,
    run_passes,
    targets,
    tokens,
)
from sparse_compile.compiler.dump import GraphDump
from sparse_compile.kernels.providers import Choice, OpCall
from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.passes.context import PassContext
from sparse_compile.passes.lower import fuse_products
from sparse_compile.passes.protocol import PassOutcome
from sparse_compile.reference import MaskedFFN

PASS = "fuse_products"


class MLP(nn.Module):
    """Projections and a function of them; the out-projection's input is the intermediate."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], adapters: bool = True, bias: bool = True):
        super().__init__()
        self.function = function

        def layer(inputs: int, outputs: int) -> nn.Module:
            return lora(inputs, outputs, bias=bias) if adapters else nn.Linear(inputs, outputs, bias=bias)

        self.gate, self.up, self.down = layer(8, 12), layer(8, 12), layer(12, 8)
        self.both = layer(8, 24)
        self.scale = nn.Parameter(torch.empty(12))
        self.broad = nn.Parameter(torch.empty(1, 1, 12))
        frozen(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def fused_gate_up(m: Any, x: Tensor) -> Tensor:
    gate, up = m.both(x).chunk(2, dim=-1)
    return m.down(F.silu(gate) * up)


FUNCTIONS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "silu gate": lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)),
    "gelu gate": lambda m, x: m.down(m.up(x) * F.gelu(m.gate(x), approximate="tanh")),
    "erf gelu": lambda m, x: m.down(F.gelu(m.gate(x)) * m.up(x)),
    "relu gate": lambda m, x: m.down(F.relu(m.gate(x)) * m.up(x)),
    "relu squared": lambda m, x: m.down(F.relu(m.up(x)).square()),
    "clamped": lambda m, x: m.down(m.up(x).clamp(min=-0.5, max=0.7) / 2 - 0.1),
    "a scale a channel": lambda m, x: m.down(F.silu(m.gate(x)) * m.scale * m.up(x)),
    "a scale of three dimensions": lambda m, x: m.down(F.gelu(m.up(x)) * m.broad),
    "a number from outside": lambda m, x: m.down(F.gelu(m.up(x)) * m.scale.sum()),
    "one fused layer": fused_gate_up,
}


@pytest.fixture
def with_a_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels compute no fp64 and run on GPUs: what they compute is tested by the reference body."""

    class Table:
        def choose(self, call: OpCall, kernels: str) -> Choice:
            return Choice("triton", ())

    monkeypatch.setattr(fuse_products, "FUSED_LINEAR", Table())


def fused(model: nn.Module, **options: object) -> tuple[Captured, PassOutcome]:
    options = options or {"layer_sparsity": {"body.0": 0.5}}
    captured = capture(model, *tokens(), config=SparseLoRAConfig(**options))  # type: ignore[arg-type]
    sparse = ("insert_predictors", "sparsify_ffn", "sparsify_attention")
    return captured, run_passes(captured, *ANALYSES, *sparse, PASS)[PASS]


@pytest.mark.usefixtures("with_a_provider")
@pytest.mark.parametrize("adapters", [True, False], ids=["adapters", "bare"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_and_gradients(name: str, adapters: bool) -> None:
    model, inputs = Head(lora(8, 8), MLP(FUNCTIONS[name], adapters)), tokens(rows=3)

    def sites(kept: dict[str, Tensor]) -> list[MaskedFFN]:
        return [MaskedFFN(model.get_submodule(f"{site}.down"), channels) for site, channels in kept.items()]

    config = SparseLoRAConfig(layer_sparsity={"body.1": 0.75})
    ran = assert_like_masked_dense(model, *inputs, labels=inputs[1], config=config, sites=sites)
    (record,) = (record for record in ran.result.records if record.name == PASS)
    assert record.stats["fused"] == 2


@pytest.mark.usefixtures("with_a_provider")
def test_golden_and_idempotent() -> None:
    captured, outcome = fused(Head(MLP(FUNCTIONS["silu gate"])))
    assert outcome.changed and not outcome.rejections
    called = targets(captured.gm)
    # Neither a product nor the region between products is left for context tokens.
    assert called.count("fused_linear") == 2 and "gathered_linear" not in called
    assert called.count("silu") == 2  # of the predictor and of the output tokens
    assert_golden(PASS, render(captured))
    assert not run_passes(captured, PASS)[PASS].changed


@pytest.mark.usefixtures("with_a_provider")
def test_the_source_of_each_kernel_is_kept(tmp_path: Path) -> None:
    captured, _ = fused(Head(MLP(FUNCTIONS["silu gate"])))
    sources = captured.ctx.results.kernel_sources
    # A sum has no derivative that is to be computed: the gradients of the result need no kernel.
    assert list(sources) == ["body.0.intermediate.py", "body.0.intermediate.backward.py", "body.0.result.py"]
    dump = GraphDump(tmp_path, "0/0")
    for name, source in sources.items():
        ast.parse(source)
        assert source.startswith(f'"""{name.removesuffix(".py").replace(".backward", ", backward")}.\n')
        dump.kernel(name, source)
    assert sorted(path.name for path in (dump.folder / "kernels").iterdir()) == sorted(sources)


@pytest.mark.usefixtures("with_a_provider")
def test_a_product_without_an_adapter_behind_it_stays_alone() -> None:
    captured, _ = fused(Head(MLP(FUNCTIONS["silu gate"], adapters=False, bias=False)))
    called = targets(captured.gm)
    assert called.count("fused_linear") == 1 and called.count("gathered_input_linear") == 1


@pytest.mark.usefixtures("with_a_provider")
def test_repeated_sites() -> None:
    model = Head(*(MLP(FUNCTIONS["silu gate"]) for _ in range(3)))
    _, outcome = fused(model, layer_sparsity={"body.0": 0.5, "body.2": 0.5})
    assert outcome.stats["fused"] == 4


@pytest.mark.usefixtures("with_a_provider")
@pytest.mark.parametrize("dim", [0, 1])
def test_dynamic_sizes(dim: int) -> None:
    ids, labels = tokens(rows=3)
    config = SparseLoRAConfig(layer_sparsity={"body.0": 0.5})
    captured = capture(
        Head(MLP(FUNCTIONS["silu gate"])), ids, labels, config=config, dynamic=((ids, dim), (labels, dim))
    )
    assert run_passes(captured, *ANALYSES, "insert_predictors", "sparsify_ffn", PASS)[PASS].changed


@pytest.mark.usefixtures("with_a_provider")
@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda m, x: m.down(torch.cos(m.up(x))), "cos has no formula"),
        (lambda m, x: m.down(F.dropout(F.silu(m.up(x)), 0.5)), "dropout draws a number for each element"),
        (lambda m, x: m.down(F.silu(m.up(x)) ** 2.3), "a power of 2.3"),
        (lambda m, x: m.down(F.softplus(m.up(x), threshold=2)), "softplus with the threshold 2"),
        (lambda m, x: m.down(m.up(x) * float("inf")), "inf is no number that a formula can hold"),
        (lambda m, x: m.down((h := m.up(x)) * F.silu(h, inplace=True)), "silu writes to "),
    ],
)
def test_a_region_without_a_formula_stays_composed(function: Callable[[Any, Tensor], Tensor], reason: str) -> None:
    captured, outcome = fused(Head(MLP(function)))
    # The result of the block is fused all the same.
    assert outcome.stats["fused"] == 1 and "gathered_linear" in targets(captured.gm)
    assert [found for found in rejections(outcome) if reason in found], rejections(outcome)


@pytest.mark.usefixtures("with_a_provider")
def test_an_intermediate_that_is_read_elsewhere() -> None:
    captured = capture(
        Head(MLP(FUNCTIONS["silu gate"])), *tokens(), config=SparseLoRAConfig(layer_sparsity={"body.0": 0.5})
    )
    run_passes(captured, *ANALYSES, "insert_predictors", "sparsify_ffn")
    gathered = next(node for node in captured.gm.graph.nodes if "gathered_linear" in str(node.target))
    with captured.gm.graph.inserting_after(gathered):
        stranger = captured.gm.graph.call_function(torch.abs, (gathered,))
        stranger.meta = dict(gathered.meta)
    outcome = run_passes(captured, PASS)[PASS]
    assert rejections(outcome) == [f"its intermediate {gathered.name} is also read by {stranger.name}"]


def test_not_asked_for() -> None:
    captured, outcome = fused(Head(MLP(FUNCTIONS["silu gate"])))
    assert not outcome.changed and not outcome.rejections
    assert "fused_linear" not in targets(captured.gm)


def test_on_a_gpu_not_before_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PassContext, "op_call", lambda self, plan: OpCall("cuda", torch.bfloat16))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    _, outcome = fused(Head(MLP(FUNCTIONS["silu gate"])))
    (reason,) = rejections(outcome)
    assert reason.startswith("triton: nothing shows yet that it is faster") and "kernels='triton'" in reason


def test_asked_for_where_it_does_not_run() -> None:
    captured, outcome = fused(Head(MLP(FUNCTIONS["silu gate"])), layer_sparsity={"body.0": 0.5}, kernels="triton")
    assert not outcome.changed and rejections(outcome) == ["triton: runs on NVIDIA GPUs, not on cpu"]
    assert dataclasses.asdict(outcome)["stats"] == {"fused": 0, "inserted": 0}
    assert "fused_linear" not in targets(captured.gm)


def test_nothing_planned() -> None:
    _, outcome = fused(Head(MLP(FUNCTIONS["silu gate"])), preset="exact")
    assert not outcome.changed and not outcome.rejections
