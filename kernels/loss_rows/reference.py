"""Plain PyTorch bodies of the ops on rows of the loss: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.kernels.token_rows.reference import fill_slots, past_the_end


def loss_rows(target: Tensor, ignore_index: int, counts: Tensor | None = None) -> Tensor:
    """Return the ascending positions (int64) of a target (N,) that are not `ignore_index`."""
    if counts is not None:
        return fill_slots(target != ignore_index, int(counts[1]))
    return torch.nonzero(target != ignore_index).squeeze(1)


def loss_slots(target: Tensor, ignore_index: int, slots: int) -> Tensor:
    """Return what `loss_rows` does in (slots,), -1 in spare slots; nothing of it waits for the device."""
    return fill_slots(target != ignore_index, slots)


def select_rows(x: Tensor, rows: Tensor, spare: bool) -> Tensor:
    """Return the rows of `x` (N, ...), (R, ...); where slots may be spare (-1), they hold row 0."""
    return x.index_select(0, rows.clamp_min(0) if spare else rows)


def place_rows(selected: Tensor, rows: Tensor, count: int, spare: bool) -> Tensor:
    """Return (count, ...) with the rows of `selected` (R, ...) in their places, and zero elsewhere."""
    placed = selected.new_zeros(count + spare, *selected.shape[1:])
    if not spare:
        return placed.index_copy_(0, rows, selected)
    return placed.index_copy_(0, past_the_end(rows, count), selected).narrow(0, 0, count)
