"""How a weight in 4 bits lies in memory, as a text that an op can take, and its channels in plain PyTorch.

Element i of the flattened weight (rows, width) is a half of byte i // 2, the upper one where i is even, and belongs to
block i // blocksize, which has a scale; the last block may be short. bitsandbytes quantises in this order, and its CUDA
kernel dequantises in it. (Where rows are not whole blocks its CPU kernel counts blocks anew in each row.)
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_compile.kernels.dequantize_4bit.reference import NESTED_BLOCKSIZE, dequantize_4bit

BLOCKSIZES = tuple(1 << power for power in range(5, 13))
"""Elements that may share a scale: 32 to 4096."""


@dataclass(frozen=True)
class PackedFormat:
    """The layout of a weight in 4 bits.

    Attributes:
        quant_type: `"nf4"` or `"fp4"`.
        blocksize: elements that share a scale, one of `BLOCKSIZES`.
        rows, width: shape of the weight as it is stored.
        nested: whether the scales are quantised themselves.
        transposed: whether the weight that is meant is the transpose of the one that is stored.
    """

    quant_type: str
    blocksize: int
    rows: int
    width: int
    nested: bool = False
    transposed: bool = False

    def __post_init__(self) -> None:
        if reason := self.reason_against(self.quant_type, self.blocksize, self.width):
            raise ValueError(f"no product reads a weight in 4 bits of this format: {reason}")

    @staticmethod
    def reason_against(quant_type: str, blocksize: int, width: int) -> str:
        """Say why no kernel reads a format, or return an empty string."""
        if quant_type not in ("nf4", "fp4"):
            return f"its numbers are {quant_type}, not nf4 or fp4"
        if blocksize not in BLOCKSIZES:
            return f"its blocks have {blocksize} elements, not a power of two from {BLOCKSIZES[0]} to {BLOCKSIZES[-1]}"
        return f"its rows have {width} elements, and of an odd number a byte is shared by two rows" if width % 2 else ""

    @property
    def text(self) -> str:
        """The format as a text, such as `"nf4 64 14336x4096 nested"`."""
        flags = " nested" * self.nested + " transposed" * self.transposed
        return f"{self.quant_type} {self.blocksize} {self.rows}x{self.width}{flags}"

    @property
    def T(self) -> PackedFormat:  # noqa: N802  (as of tensors)
        """The format of the transposed weight: the same bytes."""
        return replace(self, transposed=not self.transposed)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight that is meant."""
        return (self.width, self.rows) if self.transposed else (self.rows, self.width)

    @property
    def whole_rows(self) -> bool:
        """Whether every row begins with a block."""
        return self.width % self.blocksize == 0


@functools.lru_cache(maxsize=1024)
def parse_format(text: str) -> PackedFormat:
    """Return the format of a text.

    Raises:
        ValueError: the text is none, or no kernel reads the format.
    """
    try:
        quant_type, blocksize, size, *flags = text.split()
        rows, width = map(int, size.split("x"))
        block = int(blocksize)
    except ValueError as error:
        raise ValueError(f"not the format of a weight in 4 bits: {text!r}") from error
    if unknown := set(flags) - {"nested", "transposed"}:
        raise ValueError(f"not the format of a weight in 4 bits: {text!r}: {', '.join(sorted(unknown))}")
    return PackedFormat(quant_type, block, rows, width, "nested" in flags, "transposed" in flags)


@dataclass(frozen=True)
class PackedWeight:
    """A weight in 4 bits.

    Attributes:
        data: two elements a byte, in storage of any dtype.
        absmax: (blocks,) fp32 scales; of nested quantisation the scales of the scales.
        nested: of nested quantisation the scales (blocks,) uint8, what a byte of them stands for, (256,) fp32, and what
            was taken off before they were quantised, () fp32; else empty.
        format: its layout.
    """

    data: Tensor
    absmax: Tensor
    nested: tuple[Tensor, ...]
    format: PackedFormat

    @property
    def bytes(self) -> Tensor:
        """The data as flat bytes."""
        return self.data.reshape(-1).view(torch.uint8)

    @property
    def values(self) -> Tensor:
        """The 16 fp32 numbers that a half of a byte stands for."""
        return code_values(self.format.quant_type, self.data.device)

    def channels(self, channels: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
        """Return rows (`dim` 0) or columns (1) of the weight that is meant, dequantised as the library does."""
        form = self.format
        along_rows = (dim == 0) != form.transposed
        rows = channels if along_rows else torch.arange(form.rows, device=channels.device)
        columns = torch.arange(form.width, device=channels.device) if along_rows else channels
        at = rows[:, None] * form.width + columns
        packed = self.bytes[at // 2].int()
        halves = torch.where(at % 2 == 0, packed >> 4, packed & 15)
        dense = (self.values[halves] * self._scales(at // form.blocksize)).to(dtype)
        return dense.T if form.transposed else dense

    def _scales(self, blocks: Tensor) -> Tensor:
        if not self.nested:
            return self.absmax[blocks]
        quantised, code, offset = self.nested
        return code[quantised[blocks].int()] * self.absmax[blocks // NESTED_BLOCKSIZE] + offset


def packed_weights(weights: Sequence[Tensor], scales: Sequence[Tensor], formats: str) -> list[Tensor | PackedWeight]:
    """Return the weights of an op that takes dense ones and ones in 4 bits.

    Args:
        weights: dense weights, or the packed data.
        scales: of each packed weight, in order, absmax and, where it is nested, the three tensors of `PackedWeight`.
        formats: of each weight the text of its format, an empty one of a dense weight, joined by semicolons; an empty
            text where all are dense.

    Raises:
        ValueError: they do not fit each other, or no kernel reads a format.
    """
    texts = formats.split(";") if formats else [""] * len(weights)
    found: list[Tensor | PackedWeight] = []
    left = list(scales)
    for weight, text in zip(weights, texts, strict=True):
        if not text:
            found.append(weight)
            continue
        form = parse_format(text)
        count = 4 if form.nested else 1
        if len(left) < count:
            raise ValueError(f"a weight of the format {text!r} has {count} tensors of scales, not {len(left)}")
        own, left = left[:count], left[count:]
        found.append(PackedWeight(weight, own[0], tuple(own[1:]), form))
    if left:
        raise ValueError(f"{len(left)} tensors of scales belong to no weight")
    return found


@functools.cache
def code_values(quant_type: str, device: torch.device) -> Tensor:
    """Return the 16 numbers that a half of a byte stands for, as the library dequantises them under a scale of 1."""
    both_halves = torch.arange(16, dtype=torch.uint8, device=device).mul_(17).view(-1, 1)
    ones = torch.ones(1, device=device)
    pairs = dequantize_4bit(both_halves, ones, None, None, None, [1, 32], 32, quant_type, torch.float32)
    return pairs.view(16, 2)[:, 0].contiguous()
