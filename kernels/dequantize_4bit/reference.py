"""The specification of the dequantisation: bitsandbytes' own, of the whole weight, and the channels asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NESTED_BLOCKSIZE = 256
"""Scales that share a scale of their own where they are quantised themselves; bitsandbytes computes with no other."""


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    absmax_8bit: Tensor | None,
    absmax_code: Tensor | None,
    absmax_offset: Tensor | None,
    shape: Sequence[int],
    blocksize: int,
    quant_type: str,
    dtype: torch.dtype,
    channels: Tensor | None = None,
    dim: int = 0,
) -> Tensor:
    """Return the weight (out, in), or the rows (`dim` 0) or columns (`dim` 1) of it that `channels` names."""
    if absmax_8bit is not None:
        scales = torch.ops.bitsandbytes.dequantize_blockwise.default(
            absmax_8bit, absmax, absmax_code, NESTED_BLOCKSIZE, torch.float32
        )
        absmax = scales + absmax_offset
    weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        packed, absmax, blocksize, quant_type, list(shape), dtype
    )
    return weight if channels is None else weight.index_select(dim, channels)
