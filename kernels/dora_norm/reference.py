"""The specification of the DoRA norm, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.kernels.dtypes import at_least_fp32


def dora_norm(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return `||W + s B A||_2` of each row, (out,), computed and given in `at_least_fp32`."""
    dtype = at_least_fp32(weight, a, b)
    norms: Tensor = torch.linalg.vector_norm(weight.to(dtype) + scale * (b.to(dtype) @ a.to(dtype)), dim=1)
    return norms
