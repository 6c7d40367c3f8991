"""A semantic op for the product with a frozen weight, for devices where another library than ATen's is faster.

    frozen_linear(x, W) = x W'          d x = d y W = frozen_linear(d y, W')

W is frozen: it has no gradient, and nothing is saved for backward but W itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_compile.kernels.frozen_linear import cpu, reference
from sparse_compile.kernels.providers import REFERENCE, Provider, ProviderTable

FROZEN_LINEAR = ProviderTable(
    "frozen_linear", reference.frozen_linear, Provider("cpu_onednn", cpu.frozen_linear, cpu.declines)
)


@torch.library.custom_op("sparselora::frozen_linear", mutates_args=())
def frozen_linear(x: Tensor, weight: Tensor, provider: str = REFERENCE) -> Tensor:
    """Apply a frozen linear layer without its bias.

    Args:
        x: (..., in).
        weight: (out, in), frozen, of the dtype of `x`; may be a transposed view.
        provider: a name of `FROZEN_LINEAR`.

    Returns:
        (..., out), of the dtype of `x`.
    """
    return FROZEN_LINEAR[provider](x, weight)  # type: ignore[return-value]


@frozen_linear.register_fake
def _(x: Tensor, weight: Tensor, provider: str = REFERENCE) -> Tensor:
    assert x.dtype == weight.dtype, f"frozen_linear: x is {x.dtype}, the weight is {weight.dtype}"
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _save_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, provider = inputs
    assert not weight.requires_grad, "a product with a frozen weight has no gradient for it"
    ctx.save_for_backward(weight)
    ctx.provider = provider


def _backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
    (weight,) = ctx.saved_tensors
    return frozen_linear(d_y, weight.T, ctx.provider), None, None


frozen_linear.register_autograd(_backward, setup_context=_save_weight)
