"""Operands of the kernels that are run under the interpreter."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def drawn(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def chosen(total: int, kept: int) -> Tensor:
    return torch.randperm(total, generator=torch.Generator().manual_seed(3))[:kept].sort().values
