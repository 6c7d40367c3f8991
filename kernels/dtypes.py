"""The precision that ops compute in where that of their operands would lose digits."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_fp32(*operands: Tensor) -> torch.dtype:
    """Return the widest dtype of the operands, fp32 at least: what sums, scores and merged weights are computed in."""
    dtype = torch.float32
    for operand in operands:
        dtype = torch.promote_types(dtype, operand.dtype)
    return dtype
