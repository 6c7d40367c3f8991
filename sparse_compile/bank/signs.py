"""Matrices of random signs that are the same on every machine and with every version of PyTorch."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

__all__ = ["signs"]


def signs(name: str, rows: int, columns: int) -> Tensor:
    """Return (rows, columns) of -1 and 1, fp32, that the name and the sizes decide alone.

    What is stored was projected on them, so they come from a hash: generators of random numbers may change with a
    release.
    """
    count = rows * columns
    drawn = hashlib.shake_256(f"{name} {rows} {columns}".encode()).digest((count + 7) // 8)
    octets = torch.frombuffer(bytearray(drawn), dtype=torch.uint8)
    bits = octets.unsqueeze(1).bitwise_right_shift(torch.arange(8, dtype=torch.uint8)).bitwise_and(1)
    return (bits.reshape(-1)[:count].reshape(rows, columns).float() * 2).sub_(1)
