"""Gathered products on an NVIDIA GPU: a fused product of one term, whose kernel loads the chosen channels by index."""

from __future__ import annotations

from torch import Tensor

from sparse_compile.kernels.fused_linear import triton


def gathered_linear(x: Tensor, weight: Tensor, channels: Tensor) -> Tensor:
    """See `reference.gathered_linear`."""
    return _product(x, weight, channels, dim=0)


def gathered_input_linear(h: Tensor, weight: Tensor, channels: Tensor) -> Tensor:
    """See `reference.gathered_input_linear`."""
    return _product(h, weight, channels, dim=1)


def _product(x: Tensor, weight: Tensor, channels: Tensor, *, dim: int) -> Tensor:
    (y,) = triton.fused_linear([x], [weight], [channels], [0], [dim], [], [], [], "p0", x.dtype, [], "")
    return y.contiguous()
