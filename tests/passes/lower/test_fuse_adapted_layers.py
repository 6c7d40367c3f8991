"""A frozen layer and its adapters become one product that computes what they computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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
    gradients_of,
    lora,
    rejections,
    render,
    run_passes,
    run_rewritten,
    targets,
    tokens,
)
from sparse_compile.kernels.fused_linear import FUSED_LINEAR, reference
from sparse_compile.kernels.fused_linear.op import GRADIENTS
from sparse_compile.kernels.providers import Choice, OpCall
from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.passes.lower import fuse_adapted_layers
from sparse_compile.passes.protocol import PassOutcome
from sparse_compile.reference import MaskedFFN
from tolerances import assert_close_rms

PASS = "fuse_adapted_layers"
DISABLED = ("order_adapter_products", "select_loss_rows")
DENSE = SparseLoRAConfig(strict=True, preset="exact", kernels="triton", disable=DISABLED)


@pytest.fixture
def with_a_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels compute no fp64 and run on GPUs: in their place the reference bodies run."""

    class Table:
        def choose(self, call: OpCall, kernels: str) -> Choice:
            return Choice("triton", ())

    monkeypatch.setattr(fuse_adapted_layers, "FUSED_LINEAR", Table())
    monkeypatch.setitem(FUSED_LINEAR._run, "triton", reference.fused_linear)
    monkeypatch.setitem(GRADIENTS._run, "triton", reference.fused_linear_gradients)


class Layers(nn.Module):
    """Adapted layers, one of them biased, and a function of them."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]):
        super().__init__()
        self.function = function
        self.q, self.k, self.o = lora(8, 16), lora(8, 16, bias=True), lora(16, 8)
        self.lora_A, self.lora_B = (nn.Parameter(torch.empty(*shape)) for shape in ((2, 8), (16, 2)))
        frozen(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def dropped(m: Any, x: Tensor) -> Tensor:
    """The adapter's input is dropped out, the layer's is not."""
    low = F.linear(F.dropout(x, 0.5), m.q.lora_A)
    return m.o(torch.tanh(m.q.base_layer(x) + F.linear(low, m.q.lora_B) * 2))


def twice(m: Any, x: Tensor) -> Tensor:
    """Two adapters, the second unscaled."""
    return m.o(torch.tanh(m.q(x) + F.linear(F.linear(x, m.lora_A), m.lora_B)))


FUNCTIONS: dict[str, tuple[Callable[[Any, Tensor], Tensor], int]] = {
    # with the number of sums, the head's included
    "one input": (lambda m, x: m.o(m.q(x) * m.k(x)), 4),
    "dropout": (dropped, 3),
    "two adapters": (twice, 3),
    "in place": (lambda m, x: m.o(m.q.base_layer(x).add_(F.linear(F.linear(x, m.q.lora_A), m.q.lora_B)).tanh()), 3),
}


@pytest.mark.usefixtures("with_a_provider")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_and_gradients(name: str) -> None:
    function, sums = FUNCTIONS[name]
    model, inputs = Head(Layers(function)), tokens(rows=3)
    torch.manual_seed(3)
    ran = run_rewritten(model, *inputs, config=DENSE)
    (record,) = (record for record in ran.result.records if record.name == PASS)
    assert record.stats["fused"] == sums
    torch.manual_seed(3)
    expected = model(*inputs)
    assert_close_rms(ran.value, expected, name="loss")
    found, wanted = gradients_of(ran.value, model), gradients_of(expected, model)
    for parameter, gradient in wanted.items():
        assert_close_rms(found[parameter], gradient, name=parameter)


@pytest.mark.usefixtures("with_a_provider")
def test_output_tokens_of_a_sparse_block() -> None:
    model, inputs = Head(lora(8, 8), GatedMLP()), tokens(rows=3)

    def sites(kept: dict[str, Tensor]) -> list[MaskedFFN]:
        return [MaskedFFN(model.get_submodule(f"{site}.down"), channels) for site, channels in kept.items()]

    config = SparseLoRAConfig(layer_sparsity={"body.1": 0.75}, strict=True, kernels="triton", disable=DISABLED)
    ran = assert_like_masked_dense(model, *inputs, labels=inputs[1], config=config, sites=sites)
    (record,) = (record for record in ran.result.records if record.name == PASS)
    # Gate, up and down of output tokens, the layer before the block, the head.
    assert record.stats["fused"] == 5
    assert ran.result.sparse is not None
    assert "body.1.gate.adapted.py" in ran.ctx.results.kernel_sources


class GatedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = lora(8, 16, bias=True), lora(8, 16), lora(16, 8)
        frozen(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def fused(model: nn.Module, **options: object) -> tuple[Captured, PassOutcome]:
    captured = capture(model, *tokens(), config=SparseLoRAConfig(**{"kernels": "triton", **options}))  # type: ignore[arg-type]
    return captured, run_passes(captured, *ANALYSES, PASS)[PASS]


@pytest.mark.usefixtures("with_a_provider")
def test_golden_and_idempotent() -> None:
    captured, outcome = fused(Head(Layers(FUNCTIONS["one input"][0])))
    assert outcome.changed and not outcome.rejections
    assert targets(captured.gm).count("fused_linear") == 4
    assert_golden(PASS, render(captured))
    assert not run_passes(captured, PASS)[PASS].changed


def read_elsewhere(m: Any, x: Tensor) -> Tensor:
    up = F.linear(F.linear(x, m.q.lora_A), m.q.lora_B)
    return m.o.base_layer(torch.tanh(m.q.base_layer(x) + up) + up)


def other_dtype(m: Any, x: Tensor) -> Tensor:
    low = F.linear(x.float(), m.q.lora_A.float())
    return m.o.base_layer(torch.tanh(m.q.base_layer(x) + F.linear(low, m.q.lora_B.float())))


def written_between(m: Any, x: Tensor) -> Tensor:
    x = x * 2
    base = m.q.base_layer(x)
    low = F.linear(x, m.q.lora_A)
    x.mul_(3)
    return m.o.base_layer(torch.tanh(base + F.linear(low, m.q.lora_B)))


@pytest.mark.usefixtures("with_a_provider")
@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (read_elsewhere, "is also read by"),
        (other_dtype, "the layer and its adapter compute in different dtypes"),
        (written_between, "its input may be written to in between"),
    ],
)
def test_declined(function: Callable[[Any, Tensor], Tensor], reason: str) -> None:
    _, outcome = fused(Head(Layers(function)))
    assert outcome.stats["fused"] == 1, "the head"
    (found,) = rejections(outcome)
    assert reason in found


def test_not_asked_for_and_asked_for_where_it_does_not_run() -> None:
    model = Head(Layers(FUNCTIONS["one input"][0]))
    captured, outcome = fused(model, kernels="measured")
    assert not outcome.changed and not outcome.rejections
    captured.ctx.env = replace(captured.ctx.env, config=SparseLoRAConfig(kernels="triton"))
    outcome = run_passes(captured, PASS)[PASS]
    assert not outcome.changed and rejections(outcome) == ["triton: runs on NVIDIA GPUs, not on cpu"]
