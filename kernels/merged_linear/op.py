"""Semantic ops for a frozen linear layer with its adapter as one product (RunLoRA, arXiv 2312.03415).

    merged_linear(x, W, A, B, bias, s)      = x W' + s (x A') B' + bias
    merged_input_gradient(dy, W, A, B, s)   = dy (W + s B A)

Forward F1 is the formula as it stands, F2 is x (W + s B A)'. For the gradient of x, B1 is dy W + s (dy B) A, B5 is
dy (W + s B A). The factors' gradients are dA = s (dy B)' x and dB = s dy' (x A'): no (out, in) gradient is formed.

They are ops of their own because the merged matrix depends on no gradient: left to AOTAutograd as plain products it is
computed in the forward pass, once, and saved for the backward pass, a copy of every frozen weight; and the gradient of
A and B goes through the full gradient of the merged matrix. Here x, W, A, B are saved, and x A' where F1 formed it.

W is frozen: it has no gradient.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparse_compile.kernels.merged_linear import reference
from sparse_compile.kernels.merged_linear.reference import ASSOCIATIONS


@torch.library.custom_op("sparselora::merged_linear", mutates_args=())
def merged_linear(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scale: float, association: str
) -> tuple[Tensor, Tensor]:
    """Apply a frozen linear layer and its adapter.

    Args:
        x: (..., in).
        weight: (out, in), frozen.
        a: (r, in).
        b: (out, r).
        bias: (out,) or None.
        scale: s.
        association: a name of `ASSOCIATIONS`.

    Returns:
        `(y, thin)`: y (..., out); thin is x A' (n, r) of the n flattened tokens where the forward forms it, else
        (0, r). All operands have one dtype, which is that of the results.
    """
    return reference.merged_linear(x, weight, a, b, bias, scale, association)


@merged_linear.register_fake
def _(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scale: float, association: str
) -> tuple[Tensor, Tensor]:
    _check_dtypes("merged_linear", x, weight, a, b, bias)
    tokens = 0 if ASSOCIATIONS[association].merges_forward else math.prod(x.shape[:-1])
    return x.new_empty(*x.shape[:-1], weight.shape[0]), x.new_empty(tokens, a.shape[0])


@torch.library.custom_op("sparselora::merged_input_gradient", mutates_args=())
def merged_input_gradient(d_y: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return the gradient of the input of `merged_linear` by one product with the merged matrix.

    Args:
        d_y: (n, out).
        weight: (out, in), frozen.
        a: (r, in).
        b: (out, r).
        scale: s.

    Returns:
        (n, in).
    """
    return reference.merged_input_gradient(d_y, weight, a, b, scale)


@merged_input_gradient.register_fake
def _(d_y: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    _check_dtypes("merged_input_gradient", d_y, weight, a, b)
    return d_y.new_empty(d_y.shape[0], weight.shape[1])


def _check_dtypes(op: str, *operands: Tensor | None) -> None:
    dtypes = {operand.dtype for operand in operands if operand is not None}
    assert len(dtypes) == 1, f"{op}: operands of {dtypes}"


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, a, b, _, scale, association = inputs
    assert not weight.requires_grad, "a merged product has no gradient for its weight: it must be frozen"
    ctx.save_for_backward(x, weight, a, b, output[1])
    ctx.scale, ctx.association = scale, ASSOCIATIONS[association]
    ctx.set_materialize_grads(False)


def _linear_backward(ctx: Any, d_y: Tensor | None, d_thin: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, a, b, thin = ctx.saved_tensors
    needs_x, _, needs_a, needs_b, needs_bias, *_ = ctx.needs_input_grad
    rows = x.reshape(-1, a.shape[1])
    if ctx.association.merges_forward:
        thin, d_thin = rows @ a.t(), None
    d_y = rows.new_zeros(rows.shape[0], b.shape[0]) if d_y is None else d_y.reshape(-1, b.shape[0])
    d_low = ctx.scale * (d_y @ b)
    d_low = d_low if d_thin is None else d_low + d_thin
    d_x = _input_gradient(ctx, d_y, d_low, d_thin, weight, a, b).view_as(x) if needs_x else None
    d_a = d_low.t() @ rows if needs_a else None
    d_b = ctx.scale * (d_y.t() @ thin) if needs_b else None
    return d_x, None, d_a, d_b, d_y.sum(0) if needs_bias else None, None, None


def _input_gradient(
    ctx: Any, d_y: Tensor, d_low: Tensor, d_thin: Tensor | None, weight: Tensor, a: Tensor, b: Tensor
) -> Tensor:
    if not ctx.association.merges_backward:
        return torch.addmm(d_y @ weight, d_low, a)
    d_x = merged_input_gradient(d_y, weight, a, b, ctx.scale)
    # The merged matrix knows nothing of what reads x A' beside this layer.
    return d_x if d_thin is None else torch.addmm(d_x, d_thin, a)


def _save_input_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    d_y, weight, a, b, scale = inputs
    assert not weight.requires_grad, "a merged product has no gradient for its weight: it must be frozen"
    ctx.save_for_backward(d_y, weight, a, b)
    ctx.scale = scale


# Needed by second derivatives alone: d dy = g (W + s B A)', and for the factors dy stands where y's gradient stood.
def _input_gradient_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    d_y, weight, a, b = ctx.saved_tensors
    d_d_y = torch.addmm(g @ weight.t(), ctx.scale * (g @ a.t()), b.t())
    d_a = (ctx.scale * (d_y @ b)).t() @ g
    d_b = ctx.scale * (d_y.t() @ (g @ a.t()))
    return d_d_y, None, d_a, d_b, None


merged_linear.register_autograd(_linear_backward, setup_context=_save_linear)
merged_input_gradient.register_autograd(_input_gradient_backward, setup_context=_save_input_gradient)
