"""The frozen weights of a fused product as its generated kernel takes them.

What of a weight is used is loaded by index in the kernel where its elements are neighbours in memory along the other
dimension: chosen rows of a weight, dense or in 4 bits, and the same rows in the gradient, whose weight is transposed.

Chosen columns are scattered. Of a dense weight they are copied together first if more than one tile of rows would read
them. Of one in 4 bits they always are, dequantised: a sector of 32 bytes holds 64 of its columns and a scale serves
neighbours, so to choose one column in a hundred still reads most of the sectors that the whole weight has, and a kernel
that did so in every tile of rows would read them again and again, to look up and scale half a byte of each. The copy is
made once, is small (out, k), and lives for one call: the backward makes its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_compile.kernels.codegen.packed_tiles import FourBit
from sparse_compile.kernels.dequantize_4bit.packed import PackedFormat, PackedWeight
from sparse_compile.kernels.fused_linear.layout import aligned, empty_rows


@dataclass(frozen=True)
class FrozenOperand:
    """A weight of a fused product, or what is used of it.

    Attributes:
        gather: the dimension that the kernel indexes, or `"none"`.
        four_bit: how it is stored, where the kernel dequantises it.
        values: what the kernel takes of it, by what that is: `"w"`, the strides `"row"` and `"col"`, `"channels"`, ...
    """

    gather: int | str
    four_bit: FourBit | None
    values: dict[str, Any]

    def arguments(self, term: str) -> dict[str, Any]:
        """Return what the kernel takes of it, by the names of its parameters."""
        return {
            f"w_{term}_{what}" if what in ("row", "col") else f"{what}_{term}": value
            for what, value in self.values.items()
        }


WHOLE = -1
"""In place of a dimension that is indexed: every channel of the weight is used."""


def channels_by_product(channels: Sequence[Tensor], dims: Sequence[int]) -> list[Tensor | None]:
    """Return the channels of each product, None of one with a whole weight."""
    left = iter(channels)
    return [None if dim == WHOLE else next(left) for dim in dims]


def out_features(weight: Tensor | PackedWeight) -> int:
    """Return how many channels a product has if all are computed."""
    return weight.shape[0] if isinstance(weight, Tensor) else weight.format.shape[0]


def whole_weight(weight: Tensor | PackedWeight) -> Tensor:
    """Return a weight that is used whole.

    Raises:
        ValueError: it is in 4 bits. Each tile of rows would dequantise it again: that is done once, before the product.
    """
    if isinstance(weight, PackedWeight):
        raise ValueError("a weight in 4 bits that is used whole is dequantised before the product")
    return weight


def is_scattered(weight: Tensor | PackedWeight, dim: int) -> bool:
    """Tell whether neighbours in a slice that is chosen along `dim` are far apart in memory."""
    if dim == WHOLE:
        return False
    if isinstance(weight, Tensor):
        return weight.stride(dim) < weight.stride(1 - dim)
    return weight.format.transposed == (dim == 0)


def kernel_layout(form: PackedFormat, dim: int) -> tuple[int | str, FourBit | None]:
    """Return what a kernel indexes and dequantises of a weight in 4 bits whose dimension `dim` is chosen from.

    `"none"` and None where the chosen slice is dequantised before.
    """
    if form.transposed == (dim == 0):
        return "none", None
    return dim, FourBit(form.blocksize, form.whole_rows, form.nested)


def frozen_operand(
    weight: Tensor | PackedWeight, channels: Tensor | None, dim: int, dtype: torch.dtype, *, copied: bool
) -> FrozenOperand:
    """Return what the kernel takes of a weight.

    Args:
        weight: (out, in).
        channels: (k,) int64; None of a whole weight.
        dim: the dimension of the weight that they index, or `WHOLE`.
        dtype: of x, in which a weight in 4 bits is dequantised.
        copied: whether a scattered slice of a dense weight is copied together first.
    """
    if channels is None:
        return FrozenOperand("none", None, _matrix(whole_weight(weight)))
    scattered = is_scattered(weight, dim)
    if isinstance(weight, Tensor):
        if not (scattered and copied):
            return FrozenOperand(dim, None, {**_matrix(weight), "channels": channels})
        rows, columns = (channels.numel() if at == dim else size for at, size in enumerate(weight.shape))
        copy = torch.index_select(weight, dim, channels, out=empty_rows(weight, rows, columns))
        return FrozenOperand("none", None, _matrix(copy))
    form = weight.format
    gather, four_bit = kernel_layout(form, dim)
    if four_bit is None:
        return FrozenOperand(gather, None, _matrix(aligned(weight.channels(channels, dim, dtype))))
    values: dict[str, Any] = {"w": weight.bytes, "row": form.width // 2, "channels": channels}
    values |= {"table": weight.values, "absmax": weight.absmax}
    values |= dict(zip(("bytes", "code", "offset"), weight.nested, strict=False))
    return FrozenOperand(gather, four_bit, values)


def _matrix(matrix: Tensor) -> dict[str, Any]:
    return {"w": matrix, "row": matrix.stride(0), "col": matrix.stride(1)}
