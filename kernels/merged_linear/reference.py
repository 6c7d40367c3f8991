"""The specification of the merged products, in plain PyTorch, and the orders in which they can be associated."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear


class Association(NamedTuple):
    """An order of the products of a frozen layer and its adapter, forward and backward.

    Attributes:
        merges_forward: `x (W + s B A)'` (F2 of RunLoRA) in place of `x W' + s (x A') B'` (F1).
        merges_backward: `dy (W + s B A)` (B5) in place of `dy W + s (dy B) A` (B1).
    """

    merges_forward: bool
    merges_backward: bool


ASSOCIATIONS = {
    "F1B1": Association(False, False),
    "F1B5": Association(False, True),
    "F2B1": Association(True, False),
    "F2B5": Association(True, True),
}
"""The orders worth having, by their names in RunLoRA (arXiv 2312.03415)."""


def merged_weight(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return `W + s B A`, (out, in)."""
    return torch.addmm(weight, b, a, alpha=scale)


def merged_linear(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scale: float, association: str
) -> tuple[Tensor, Tensor]:
    """Return `x W' + s (x A') B' + bias`, and `x A'` where it was formed on the way (else an empty tensor)."""
    rows = x.reshape(-1, x.shape[-1])
    if ASSOCIATIONS[association].merges_forward:
        y, thin = linear(rows, merged_weight(weight, a, b, scale), bias), x.new_empty(0, a.shape[0])
    else:
        thin = linear(rows, a)
        # The adapter's product accumulates into the base's: no third tensor of that size.
        y = linear(rows, weight, bias).addmm_(thin, b.t(), alpha=scale)
    return y.reshape(*x.shape[:-1], y.shape[-1]), thin


def merged_input_gradient(d_y: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return `dy (W + s B A)`."""
    return d_y @ merged_weight(weight, a, b, scale)
