"""Gathered products on a CPU: gather the few chosen channels once, then one dense GEMM (oneDNN or MKL through ATen)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear


def gathered_linear(x: Tensor, weight: Tensor, channels: Tensor) -> Tensor:
    """See `reference.gathered_linear`."""
    return linear(x, weight.index_select(0, channels).to(x.dtype))


def gathered_input_linear(h: Tensor, weight: Tensor, channels: Tensor) -> Tensor:
    """See `reference.gathered_input_linear`."""
    return linear(h, weight.index_select(1, channels).to(h.dtype))
