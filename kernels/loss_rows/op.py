"""Semantic ops that keep the rows of the loss and leave the others out.

`select_rows` and `place_rows` are each other's adjoint. A row is selected once, so neither direction needs atomics or
an accumulating scatter, which is what the gradient of `index_select` would be.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_compile.kernels.loss_rows import reference
from sparse_compile.torch_private import new_unbacked_size


@torch.library.custom_op("sparselora::loss_rows", mutates_args=())
def loss_rows(target: Tensor, ignore_index: int) -> Tensor:
    """Return the ascending positions (int64) of the targets that are not ignored.

    Args:
        target: (N,) integers.
        ignore_index: the target that carries no loss.

    Returns:
        (R,); R is known at run time only, 0 and N included.
    """
    return reference.loss_rows(target, ignore_index)


@loss_rows.register_fake
def _(target: Tensor, ignore_index: int) -> Tensor:
    return target.new_empty(new_unbacked_size(max_size=target.shape[0]), dtype=torch.int64)


@torch.library.custom_op("sparselora::select_rows", mutates_args=())
def select_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Return some rows of `x`.

    Args:
        x: (N, ...).
        rows: (R,) int64, distinct positions.

    Returns:
        (R, ...).
    """
    return reference.select_rows(x, rows)


@select_rows.register_fake
def _(x: Tensor, rows: Tensor) -> Tensor:
    return x.new_empty(rows.shape[0], *x.shape[1:])


@torch.library.custom_op("sparselora::place_rows", mutates_args=())
def place_rows(selected: Tensor, rows: Tensor, count: int) -> Tensor:
    """Put rows in their places among zeros.

    Args:
        selected: (R, ...).
        rows: (R,) int64, distinct positions below `count`.
        count: N.

    Returns:
        (N, ...).
    """
    return reference.place_rows(selected, rows, count)


@place_rows.register_fake
def _(selected: Tensor, rows: Tensor, count: int) -> Tensor:
    return selected.new_empty(count, *selected.shape[1:])


def _save_select(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, rows = inputs
    ctx.save_for_backward(rows)
    ctx.count = x.shape[0]


def _select_backward(ctx: Any, d_selected: Tensor) -> tuple[Tensor | None, ...]:
    (rows,) = ctx.saved_tensors
    return place_rows(d_selected, rows, ctx.count), None


def _save_place(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[1])


def _place_backward(ctx: Any, d_placed: Tensor) -> tuple[Tensor | None, ...]:
    (rows,) = ctx.saved_tensors
    return select_rows(d_placed, rows), None, None


select_rows.register_autograd(_select_backward, setup_context=_save_select)
place_rows.register_autograd(_place_backward, setup_context=_save_place)
