"""The specification of the gathered products, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor


def gathered_linear(x: Tensor, weight: Tensor, channels: Tensor) -> Tensor:
    """Return `x @ weight[channels].T`; the chosen rows are cast to the dtype of `x`."""
    return x @ weight[channels].to(x.dtype).T


def gathered_input_linear(h: Tensor, weight: Tensor, channels: Tensor) -> Tensor:
    """Return `h @ weight[:, channels].T`; the chosen columns are cast to the dtype of `h`."""
    return h @ weight[:, channels].to(h.dtype).T
