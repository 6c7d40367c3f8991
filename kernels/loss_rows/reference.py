"""Plain PyTorch bodies of the ops on rows of the loss: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def loss_rows(target: Tensor, ignore_index: int) -> Tensor:
    """Return the ascending positions (int64) of a target (N,) that are not `ignore_index`."""
    return torch.nonzero(target != ignore_index).squeeze(1)


def select_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Return the rows of `x` (N, ...), (R, ...)."""
    return x.index_select(0, rows)


def place_rows(selected: Tensor, rows: Tensor, count: int) -> Tensor:
    """Return (count, ...) with the rows of `selected` (R, ...) in their places, and zero elsewhere."""
    placed = selected.new_zeros(count, *selected.shape[1:])
    return placed.index_copy_(0, rows, selected)
