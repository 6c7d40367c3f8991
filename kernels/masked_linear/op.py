"""Semantic ops for a pruned linear layer whose adapter keeps its zeros (LoRS, arXiv 2501.08582).

    W~                                       = (W + s B A) * (W != 0)
    masked_linear(x, W, A, B, bias, s)       = x W~' + bias
    masked_input_gradient(dy, W, A, B, s)    = dy W~
    masked_factor_gradients(dy, x, W, A, B)  = (dA, dB), by one of two rules

"straight-through" (the paper's) leaves the mask out and associates again: dA = s (dy B)' x, dB = s dy' (x A'), which
costs O(n r (in + out)). "exact" is the gradient of the masked function: dA = s B' G, dB = s G A' with
G = (dy' x) * (W != 0), a third product as large as the layer's.

They are ops of their own because W~ and x A' depend on no gradient: left to AOTAutograd they are computed in the
forward pass and saved, and a plain `(W + s B A) * mask` saves the mask as well. Here x, W, A, B are saved and nothing
else; what the backward needs of W~ it builds again.

W is frozen: it has no gradient. Its zeros are read at each call. W, A and B may be of other dtypes than x (fp32
adapters on a bf16 weight, fp32 weights under bf16 autocast): W~ is merged in fp32 or wider and rounded to the dtype of
x once, so that training sees the weight that a checkpoint merged in that dtype holds. There is no second derivative.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_compile.kernels.masked_linear import blocks, reference, triton
from sparse_compile.kernels.providers import REFERENCE, OpCall, Provider, ProviderTable, triton_runs
from sparse_compile.options.config import MASK_GRADIENTS


def _any_call(call: OpCall) -> None:
    """Decline nothing."""


MASKED_LINEAR = ProviderTable(
    "masked_linear",
    reference.masked_linear,
    Provider("blocks", blocks.masked_linear, _any_call),
    candidates=(Provider("triton", triton.masked_linear, triton_runs),),
)
MASKED_INPUT_GRADIENT = ProviderTable(
    "masked_input_gradient",
    reference.masked_input_gradient,
    Provider("blocks", blocks.masked_input_gradient, _any_call),
    candidates=(Provider("triton", triton.masked_input_gradient, triton_runs),),
)
EXACT_GRADIENTS = ProviderTable(
    "masked_factor_gradients",
    reference.exact_gradients,
    Provider("blocks", blocks.exact_gradients, _any_call),
    # The mask lies on the result of that product, not on an operand: the kernel has nothing to fuse there.
    candidates=(Provider("triton", blocks.exact_gradients, triton_runs),),
)


@torch.library.custom_op("sparselora::masked_linear", mutates_args=())
def masked_linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scale: float,
    mask_gradient: str,
    provider: str = REFERENCE,
) -> Tensor:
    """Apply a frozen linear layer and its adapter, zeros of the weight kept.

    Args:
        x: (..., in).
        weight: (out, in), frozen.
        a: (r, in).
        b: (out, r).
        bias: (out,) or None.
        scale: s.
        mask_gradient: a name of `MASK_GRADIENTS`: how A and B get their gradients.
        provider: a name of `MASKED_LINEAR`.

    Returns:
        (..., out), of the dtype of `x`.
    """
    # A product with x as autocast left it: it has been cast where the pass found autocast on.
    with torch.autocast(x.device.type, enabled=False):
        y = MASKED_LINEAR[provider](x.reshape(-1, x.shape[-1]), weight, a, b, bias, scale)
    assert isinstance(y, Tensor)
    return y.reshape(*x.shape[:-1], y.shape[-1])


@masked_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scale: float,
    mask_gradient: str,
    provider: str = REFERENCE,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("sparselora::masked_input_gradient", mutates_args=())
def masked_input_gradient(
    d_y: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, provider: str = REFERENCE
) -> Tensor:
    """Return the gradient of the input of `masked_linear`, (n, in), for d_y (n, out)."""
    with torch.autocast(d_y.device.type, enabled=False):
        return MASKED_INPUT_GRADIENT[provider](d_y, weight, a, b, scale)  # type: ignore[return-value]


@masked_input_gradient.register_fake
def _(d_y: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, provider: str = REFERENCE) -> Tensor:
    return d_y.new_empty(d_y.shape[0], weight.shape[1])


@torch.library.custom_op("sparselora::masked_factor_gradients", mutates_args=())
def masked_factor_gradients(
    d_y: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    mask_gradient: str,
    provider: str = REFERENCE,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of A and B of `masked_linear`.

    Args:
        d_y: (n, out).
        x: (n, in).
        weight: (out, in), frozen; "exact" alone reads it.
        a: (r, in).
        b: (out, r).
        scale: s.
        mask_gradient: a name of `MASK_GRADIENTS`.
        provider: a name of `MASKED_LINEAR`.

    Returns:
        `(dA, dB)`, of the shapes and dtypes of A and B.
    """
    assert mask_gradient in MASK_GRADIENTS, mask_gradient
    with torch.autocast(x.device.type, enabled=False):
        if mask_gradient == "exact":
            return EXACT_GRADIENTS[provider](d_y, x, weight, a, b, scale)  # type: ignore[return-value]
        return reference.straight_through_gradients(d_y, x, a, b, scale)


@masked_factor_gradients.register_fake
def _(
    d_y: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    mask_gradient: str,
    provider: str = REFERENCE,
) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape), b.new_empty(b.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, a, b, _, scale, mask_gradient, provider = inputs
    assert not weight.requires_grad, "a masked product has no gradient for its weight: it must be frozen"
    ctx.save_for_backward(x, weight, a, b)
    ctx.scale, ctx.mask_gradient, ctx.provider = scale, mask_gradient, provider


def _backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, a, b = ctx.saved_tensors
    needs_x, _, needs_a, needs_b, needs_bias, *_ = ctx.needs_input_grad
    rows, d_y = x.reshape(-1, x.shape[-1]), d_y.reshape(-1, d_y.shape[-1])
    d_x = d_a = d_b = None
    if needs_x:
        d_x = masked_input_gradient(d_y, weight, a, b, ctx.scale, ctx.provider).view_as(x)
    if needs_a or needs_b:
        d_a, d_b = masked_factor_gradients(d_y, rows, weight, a, b, ctx.scale, ctx.mask_gradient, ctx.provider)
    d_bias = d_y.sum(0) if needs_bias else None
    return d_x, None, d_a if needs_a else None, d_b if needs_b else None, d_bias, None, None, None


masked_linear.register_autograd(_backward, setup_context=_save)
