"""The memory layout of gathered tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def empty_rows(like: Tensor, rows: int, columns: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return an empty (rows, columns) tensor whose rows begin at multiples of 16 elements.

    A number of chosen channels is seldom round (143 of 14336). Were rows packed, a GPU could load and store them by
    single elements only: neither vectors nor asynchronous copies may straddle their alignment.
    """
    return like.new_empty_strided((rows, columns), (-(-columns // 16) * 16, 1), dtype=dtype or like.dtype)


def aligned(matrix: Tensor) -> Tensor:
    """Return a copy of a matrix in that layout, or the matrix itself where it has it."""
    copy = empty_rows(matrix, matrix.shape[0], matrix.shape[1])
    return matrix if matrix.stride() == copy.stride() else copy.copy_(matrix)
