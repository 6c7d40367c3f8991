"""Semantic ops that keep the rows of the loss and leave the others out.

`select_rows` and `place_rows` are each other's adjoint. A row is selected once, so neither direction needs atomics or
an accumulating scatter, which is what the gradient of `index_select` would be.

`loss_slots` takes the place of `loss_rows` where sizes have to be fixed: a spare slot has position -1, holds row 0, a
real one, and passes no gradient on. Whoever selects has to see to it that nothing is computed of it: here the target of
a spare slot is the one that the loss ignores.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_compile.kernels.loss_rows import reference
from sparse_compile.kernels.token_rows.capacity import check_slots
from sparse_compile.kernels.token_rows.reference import without_spare_slots
from sparse_compile.torch_private.fake import new_unbacked_size


@torch.library.custom_op("sparselora::loss_rows", mutates_args=())
def loss_rows(target: Tensor, ignore_index: int, counts: Tensor | None = None) -> Tensor:
    """Return the ascending positions (int64) of the targets that are not ignored.

    Args:
        target: (N,) integers.
        ignore_index: the target that carries no loss.
        counts: what `row_counts` returns of them; without it this waits for the device.

    Returns:
        (R,); R is known at run time only, 0 and N included.
    """
    return reference.loss_rows(target, ignore_index, counts)


@loss_rows.register_fake
def _(target: Tensor, ignore_index: int, counts: Tensor | None = None) -> Tensor:
    return target.new_empty(new_unbacked_size(max_size=target.shape[0]), dtype=torch.int64)


@torch.library.custom_op("sparselora::loss_slots", mutates_args=())
def loss_slots(target: Tensor, ignore_index: int, slots: int, option: str) -> Tensor:
    """Return the ascending positions (int64) of the targets that are not ignored, in a vector of a given size.

    Args:
        target: (N,) integers.
        ignore_index: the target that carries no loss.
        slots: the size.
        option: the option that chose it, for the error.

    Returns:
        (slots,); -1 in spare slots.

    Raises:
        RuntimeError: there are more such targets than slots. On a GPU nothing waits for that: a device assert.
    """
    check_slots(target != ignore_index, slots, "rows of the loss", option)
    return reference.loss_slots(target, ignore_index, slots)


@loss_slots.register_fake
def _(target: Tensor, ignore_index: int, slots: int, option: str) -> Tensor:
    return target.new_empty(slots, dtype=torch.int64)


@torch.library.custom_op("sparselora::select_rows", mutates_args=())
def select_rows(x: Tensor, rows: Tensor, spare: bool = False) -> Tensor:
    """Return some rows of `x`.

    Args:
        x: (N, ...).
        rows: (R,) int64, distinct positions.
        spare: whether there may be spare slots among them, -1, which hold row 0.

    Returns:
        (R, ...).
    """
    return reference.select_rows(x, rows, spare)


@select_rows.register_fake
def _(x: Tensor, rows: Tensor, spare: bool = False) -> Tensor:
    return x.new_empty(rows.shape[0], *x.shape[1:])


@torch.library.custom_op("sparselora::place_rows", mutates_args=())
def place_rows(selected: Tensor, rows: Tensor, count: int, spare: bool = False) -> Tensor:
    """Put rows in their places among zeros.

    Args:
        selected: (R, ...).
        rows: (R,) int64, distinct positions below `count`.
        count: N.
        spare: whether there may be spare slots among the rows, -1, which have no place.

    Returns:
        (N, ...).
    """
    return reference.place_rows(selected, rows, count, spare)


@place_rows.register_fake
def _(selected: Tensor, rows: Tensor, count: int, spare: bool = False) -> Tensor:
    return selected.new_empty(count, *selected.shape[1:])


def _save_select(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, rows, spare = inputs
    ctx.save_for_backward(rows)
    ctx.count, ctx.spare = x.shape[0], spare


def _select_backward(ctx: Any, d_selected: Tensor) -> tuple[Tensor | None, ...]:
    (rows,) = ctx.saved_tensors
    return place_rows(d_selected, rows, ctx.count, ctx.spare), None, None


def _save_place(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, rows, _, spare = inputs
    ctx.save_for_backward(rows)
    ctx.spare = spare


def _place_backward(ctx: Any, d_placed: Tensor) -> tuple[Tensor | None, ...]:
    (rows,) = ctx.saved_tensors
    d_selected = select_rows(d_placed, rows, ctx.spare)
    if ctx.spare:
        d_selected = without_spare_slots(d_selected, rows)
    return d_selected, None, None, None


select_rows.register_autograd(_select_backward, setup_context=_save_select)
place_rows.register_autograd(_place_backward, setup_context=_save_place)
