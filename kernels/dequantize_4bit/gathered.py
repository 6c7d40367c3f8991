"""Dequantise the chosen rows or columns of a weight and read nothing of the others.

Element i of the flattened weight (out, in) is a half of byte i // 2, the upper one where i is even, and belongs to
block i // blocksize, which has a scale. Where rows are whole blocks, chosen rows are a smaller weight in the same
format, which the library dequantises. A column has an element in each row, in a block with others that are not chosen:
its halves of bytes and their scales are gathered one by one. Where rows are not whole blocks, the library's CPU kernel
counts blocks anew in each row and its CUDA kernel does not (0.50): there the whole weight is dequantised by whichever
runs the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_compile.kernels.dequantize_4bit.packed import code_values
from sparse_compile.kernels.dequantize_4bit.reference import NESTED_BLOCKSIZE, dequantize_4bit


def dequantize_channels(
    packed: Tensor,
    absmax: Tensor,
    absmax_8bit: Tensor | None,
    absmax_code: Tensor | None,
    absmax_offset: Tensor | None,
    shape: Sequence[int],
    blocksize: int,
    quant_type: str,
    dtype: torch.dtype,
    channels: Tensor,
    dim: int,
) -> Tensor:
    """See `reference.dequantize_4bit`."""
    nested = absmax_8bit, absmax_code, absmax_offset
    form = blocksize, quant_type, dtype
    rows, width = shape
    if width % blocksize:
        return dequantize_4bit(packed, absmax, *nested, shape, *form, channels, dim)
    data = packed.reshape(-1).view(torch.uint8).view(rows, width // 2)
    blocks = width // blocksize
    if dim == 0:
        chosen = channels[:, None] * blocks + torch.arange(blocks, device=data.device)
        scales = _scales(absmax, *nested, chosen).reshape(-1)
        size = [channels.numel(), width]
        return dequantize_4bit(data.index_select(0, channels).view(-1, 1), scales, None, None, None, size, *form)
    taken = data.index_select(1, channels // 2)
    halves = torch.where(channels % 2 == 0, taken >> 4, taken & 15)
    scales = _scales(absmax, *nested, torch.arange(rows, device=data.device)[:, None] * blocks + channels // blocksize)
    return (code_values(quant_type, data.device)[halves.int()] * scales).to(dtype)


def _scales(
    absmax: Tensor,
    absmax_8bit: Tensor | None,
    absmax_code: Tensor | None,
    absmax_offset: Tensor | None,
    blocks: Tensor,
) -> Tensor:
    """Return the scales of blocks, given by their numbers."""
    if absmax_8bit is None:
        return absmax[blocks]
    assert absmax_code is not None and absmax_offset is not None
    return absmax_code[absmax_8bit[blocks].int()] * absmax[blocks // NESTED_BLOCKSIZE] + absmax_offset
