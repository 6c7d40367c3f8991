"""FLOPs counted from graphs: products of every spelling, ops of this package and of others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F  # noqa: N812

from graphs import ANALYSES, capture, run_passes
from sparse_compile.graph.flops import StepFlops, step_flops
from sparse_compile.options.config import SparseLoRAConfig


def flops(function: Callable[..., Any], *inputs: Tensor) -> StepFlops:
    return step_flops(capture(function, *inputs).gm.graph)


def with_gradient(*shape: int) -> Tensor:
    return torch.zeros(*shape, requires_grad=True)


@pytest.mark.parametrize(
    ("function", "shapes", "expected"),
    [
        (lambda x, w: x @ w, [(5, 3), (3, 4)], 2 * 5 * 3 * 4 * 3),
        (lambda x, w: torch.mm(input=x, mat2=w), [(5, 3), (3, 4)], 2 * 5 * 3 * 4 * 3),
        (lambda x: x @ x, [(4, 4)], 2 * 4 * 4 * 4 * 3),
        (lambda x, v: x @ v, [(5, 3), (3,)], 2 * 5 * 3 * 3),
        (lambda b, x, w: torch.addmm(b, x, w), [(5, 4), (5, 3), (3, 4)], 2 * 5 * 3 * 4 * 3),
        (lambda x, w: F.linear(x, w.detach()), [(2, 5, 3), (4, 3)], 2 * 10 * 3 * 4 * 2),
        (lambda x, w: F.linear(x, w).detach(), [(5, 3), (4, 3)], 2 * 5 * 3 * 4),
        # 6 x 6 scores of width 4, values of width 2; half of the scores; 2 products forward and 5 backward.
        (F.scaled_dot_product_attention, [(1, 1, 6, 4), (1, 1, 6, 4), (1, 1, 6, 2)], 36 * (4 + 2) * 7 / 2),
        # Attention over another sequence: all scores.
        (F.scaled_dot_product_attention, [(1, 1, 6, 4), (1, 1, 3, 4), (1, 1, 3, 4)], 2 * 18 * 8 * 7 / 2),
    ],
)
def test_products(function: Callable[..., Any], shapes: list[tuple[int, ...]], expected: float) -> None:
    assert float(flops(function, *(with_gradient(*shape) for shape in shapes)).total) == expected


def test_products_with_frozen_weights_count_apart() -> None:
    frozen, trained = nn.Linear(3, 4, bias=False).requires_grad_(False), nn.Linear(3, 4, bias=False)
    counted = flops(lambda x: frozen(x) + trained(x), with_gradient(5, 3))
    assert counted == StepFlops(sympy.Integer(120 * 2 + 120 * 3), sympy.Integer(120 * 2))


@torch.library.custom_op("foreign::fused_linear", mutates_args=())
def fused_linear(x: Tensor) -> Tensor:
    return x.clone()


@fused_linear.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_an_op_of_somebody_else_counts_nothing_whatever_its_name() -> None:
    assert flops(lambda x: torch.ops.foreign.fused_linear(x), torch.zeros(2, 2)).total == 0


class Adapted(nn.Module):
    """A layer whose adapter is so wide that merging it pays; its output is read without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(16, 16, bias=False).requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.zeros(8, 16)), nn.Parameter(torch.zeros(16, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.sum(), (self.base(x) + F.linear(F.linear(x, self.a), self.b)).detach()


def test_a_merged_layer_without_a_backward_counts_its_forward() -> None:
    captured = capture(Adapted(), with_gradient(512, 16), config=SparseLoRAConfig(preset="exact"))
    before = step_flops(captured.gm.graph)
    run_passes(captured, *ANALYSES, "order_adapter_products")
    assert any("merged_linear" in str(node.target) for node in captured.gm.graph.nodes)
    forward = 2 * 512 * (16 * 16 + 8 * 32)
    assert before.total == step_flops(captured.gm.graph).total == forward


def test_values_are_needed() -> None:
    """A node without a value has no shape, and a product of it counts nothing: nothing is guessed."""
    gm = capture(lambda x: x @ x, with_gradient(4, 4)).gm
    node: fx.Node
    for node in gm.graph.nodes:
        node.meta.pop("example_value", None)
    assert step_flops(gm.graph).total == 0
