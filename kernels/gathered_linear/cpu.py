"""Gathered products on a CPU: gather the few chosen channels once, then one dense product."""

from __future__ import annotations

from torch import Tensor

from sparse_compile.kernels.cpu_gemm import product


def gathered_linear(x: Tensor, weight: Tensor, channels: Tensor) -> Tensor:
    """See `reference.gathered_linear`."""
    return product(x, _take(weight, 0, channels).to(x.dtype))


def gathered_input_linear(h: Tensor, weight: Tensor, channels: Tensor) -> Tensor:
    """See `reference.gathered_input_linear`."""
    return product(h, _take(weight, 1, channels).to(h.dtype))


def _take(weight: Tensor, dim: int, channels: Tensor) -> Tensor:
    """Return some rows or columns of a matrix that may be a transposed view, as the gradients' products have it.

    `index_select` first makes such a view contiguous: a copy of the whole weight to read a hundredth of it.
    """
    if weight.stride(0) < weight.stride(1):
        return weight.t().index_select(1 - dim, channels).t()
    return weight.index_select(dim, channels)
