"""The specification of a layer whose adapter keeps the zeros of its weight, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparse_compile.kernels.dtypes import at_least_fp32


def masked_weight(weight: Tensor, a: Tensor, b: Tensor, scale: float, dtype: torch.dtype | None = None) -> Tensor:
    """Return `(W + s B A) * (W != 0)`, merged in `at_least_fp32`, as `dtype` (that of `weight` where not given).

    Args:
        weight: (out, in), or a block of its rows or columns with those of B or A.
        a: (r, in).
        b: (out, r).
        scale: s.
        dtype: of the result.
    """
    wide = at_least_fp32(weight, a, b)
    merged = torch.addmm(weight.to(wide), b.to(wide), a.to(wide), alpha=scale)
    return merged.masked_fill_(weight == 0, 0).to(dtype or weight.dtype)


def masked_linear(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Return `x W~' + bias` with `W~ = (W + s B A) * (W != 0)`, for x (n, in)."""
    return linear(x, masked_weight(weight, a, b, scale, x.dtype), None if bias is None else bias.to(x.dtype))


def masked_input_gradient(d_y: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return `dy W~`, (n, in)."""
    return d_y @ masked_weight(weight, a, b, scale, d_y.dtype)


def straight_through_gradients(d_y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return `dA = s (dy B)' x` and `dB = s dy' (x A')`: the gradients with the mask left out.

    No (out, in) gradient is formed. The published code leaves s out of both.
    """
    dtype = torch.promote_types(x.dtype, torch.promote_types(a.dtype, b.dtype))
    rows, d_y = x.to(dtype), d_y.to(dtype)
    d_a = scale * ((d_y @ b.to(dtype)).t() @ rows)
    d_b = scale * (d_y.t() @ (rows @ a.to(dtype).t()))
    return d_a.to(a.dtype), d_b.to(b.dtype)


def exact_gradients(
    d_y: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return `dA = s B' G` and `dB = s G A'` with `G = (dy' x) * (W != 0)`: the gradients of the masked function."""
    dtype = at_least_fp32(x, a, b)
    g = (d_y.t() @ x).masked_fill_(weight == 0, 0).to(dtype)
    return (scale * (b.to(dtype).t() @ g)).to(a.dtype), (scale * (g @ a.to(dtype).t())).to(b.dtype)
