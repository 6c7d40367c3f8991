"""The specification of the DoRA norm, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def dora_norm(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return `||W + s B A||_2` of each row, (out,), computed in `norm_dtype`."""
    dtype = norm_dtype(weight, a, b)
    norms: Tensor = torch.linalg.vector_norm(weight.to(dtype) + scale * (b.to(dtype) @ a.to(dtype)), dim=1)
    return norms


def norm_dtype(*operands: Tensor) -> torch.dtype:
    """Return the dtype that the norm is computed and given in: the widest of the operands', fp32 at least."""
    dtype = torch.float32
    for operand in operands:
        dtype = torch.promote_types(dtype, operand.dtype)
    return dtype
