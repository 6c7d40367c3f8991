"""A semantic op for a frozen weight in 4 bits (QLoRA, arXiv 2305.14314), as bitsandbytes stores it.

It is not differentiated: the weight is frozen. A product with its result is a product like any other, so that every
pass that knows `linear` knows a quantised layer; marked for recomputation, the dense weight is never saved for the
backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_compile.kernels.dequantize_4bit import gathered, reference


@torch.library.custom_op("sparselora::dequantize_4bit", mutates_args=())
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
    """Dequantise a weight, or some of its rows or columns; only what is chosen is read.

    Args:
        packed: two elements a byte, in storage of any dtype.
        absmax: (blocks,) fp32 scales; of nested quantisation the scales of the scales.
        absmax_8bit: (blocks,) uint8, the scales of nested quantisation, or None.
        absmax_code: (256,) fp32, what a byte of them stands for, or None.
        absmax_offset: () fp32, what was taken off before they were quantised, or None.
        shape: (out, in).
        blocksize: elements that share a scale.
        quant_type: `"nf4"` or `"fp4"`.
        dtype: of the result.
        channels: (k,) int64, the rows or columns wanted; None for all.
        dim: 0 for rows, 1 for columns.

    Returns:
        (out, in), (k, in) or (out, k).
    """
    operands = packed, absmax, absmax_8bit, absmax_code, absmax_offset, shape, blocksize, quant_type, dtype
    if channels is None:
        return reference.dequantize_4bit(*operands)
    return gathered.dequantize_channels(*operands, channels, dim)


@dequantize_4bit.register_fake
def _(
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
    size = list(shape)
    if channels is not None:
        size[dim] = channels.shape[0]
    return absmax.new_empty(size, dtype=dtype)
