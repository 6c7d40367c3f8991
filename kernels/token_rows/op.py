"""Semantic ops that split the N tokens of a batch by role, and merge them again.

`split_tokens` runs once a graph: one data-dependent size for the whole training step. Where the end of the model runs
on the rows of the loss, whose number depends on data as well, `row_counts` reads both at once, so that a step waits for
the device once. `token_slots` takes the place of the split where sizes have to be fixed (CUDA graphs): more slots than
tokens, of which the spare ones are computed and thrown away. `take_rows` and `put_rows` are each other's adjoint, so
that neither direction needs atomics or an accumulating scatter:

    output, context = take_rows(x, rows..., columns)      d x      = put_rows(d output, d context, rows..., columns)
    y = put_rows(output, context, rows..., columns)       d output, d context = take_rows(d y, rows..., columns)

A spare slot has row -1. `take_rows` gives it row 0, a real one; `put_rows` does not read it, so its gradient is zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_compile.kernels.providers import REFERENCE, Provider, ProviderTable, cpu_only, triton_runs
from sparse_compile.kernels.token_rows import cpu, reference, triton
from sparse_compile.kernels.token_rows.capacity import check_slots
from sparse_compile.torch_private.fake import new_unbacked_size

TAKE_ROWS = ProviderTable(
    "take_rows",
    reference.take_rows,
    Provider("cpu_index", cpu.take_rows, cpu_only),
    candidates=(Provider("triton", triton.take_rows, triton_runs),),
)
PUT_ROWS = ProviderTable(
    "put_rows",
    reference.put_rows,
    Provider("cpu_index", cpu.put_rows, cpu_only),
    candidates=(Provider("triton", triton.put_rows, triton_runs),),
)


@torch.library.custom_op("sparselora::row_counts", mutates_args=())
def row_counts(output_mask: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Count what `split_tokens` and `loss_rows` find, for both of them: the one time that a step waits for the device.

    Args:
        output_mask: bool, any shape.
        target: (N,) integers.
        ignore_index: the target that carries no loss.

    Returns:
        (2,) int64, on the CPU: output tokens, and targets that are not ignored.
    """
    return reference.row_counts(output_mask, target, ignore_index)


@row_counts.register_fake
def _(output_mask: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    return torch.empty(2, dtype=torch.int64, device="cpu")


@torch.library.custom_op("sparselora::split_tokens", mutates_args=())
def split_tokens(output_mask: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the indices of the output tokens and of the context tokens, each ascending (int64).

    Args:
        output_mask: bool, any shape with N elements; a flattened position is an index.
        counts: what `row_counts` returns; without it this waits for the device.

    Returns:
        `(output_rows, context_rows)` of sizes n and N - n; n is known at run time only.
    """
    return reference.split_tokens(output_mask, counts)


@split_tokens.register_fake
def _(output_mask: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    tokens = output_mask.numel()
    outputs = new_unbacked_size(max_size=tokens)
    return (
        output_mask.new_empty(outputs, dtype=torch.int64),
        output_mask.new_empty(tokens - outputs, dtype=torch.int64),
    )


@torch.library.custom_op("sparselora::token_slots", mutates_args=())
def token_slots(output_mask: Tensor, outputs: int, contexts: int, option: str) -> tuple[Tensor, Tensor]:
    """Return the indices of the output tokens and of the context tokens in vectors of given sizes.

    Args:
        output_mask: bool, any shape with N elements; a flattened position is an index.
        outputs: slots for output tokens.
        contexts: slots for context tokens.
        option: the option that chose the sizes, for the error.

    Returns:
        `(output_rows, context_rows)`, (outputs,) and (contexts,) int64: ascending indices, then -1 in spare slots.

    Raises:
        RuntimeError: there are more tokens of a role than slots. On a GPU nothing waits for that: a device assert.
    """
    flat = output_mask.reshape(-1)
    check_slots(flat, outputs, "output tokens", option)
    check_slots(flat.logical_not(), contexts, "context tokens", option)
    return reference.token_slots(output_mask, outputs, contexts)


@token_slots.register_fake
def _(output_mask: Tensor, outputs: int, contexts: int, option: str) -> tuple[Tensor, Tensor]:
    return (
        output_mask.new_empty(outputs, dtype=torch.int64),
        output_mask.new_empty(contexts, dtype=torch.int64),
    )


@torch.library.custom_op("sparselora::take_rows", mutates_args=())
def take_rows(
    x: Tensor,
    output_rows: Tensor,
    context_rows: Tensor,
    columns: Tensor | None = None,
    provider: str = REFERENCE,
    tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Split the tokens of `x` by role.

    Args:
        x: (N, C).
        output_rows: (n,) int64; together with `context_rows` a partition of 0..N-1.
        context_rows: (N - n,) int64.
        columns: (k,) int64, distinct, or None: the channels taken of the context tokens.
        provider: a name of `TAKE_ROWS`.
        tokens: N where the rows are those of `token_slots`, more of them and -1 in spare slots; None: none is spare.

    Returns:
        `(output, context)` of shapes (n, C) and (N - n, k or C); a spare slot holds row 0, and passes no gradient on.
    """
    return TAKE_ROWS[provider](x, output_rows, context_rows, columns, tokens)  # type: ignore[return-value]


@take_rows.register_fake
def _(
    x: Tensor,
    output_rows: Tensor,
    context_rows: Tensor,
    columns: Tensor | None = None,
    provider: str = REFERENCE,
    tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    width = x.shape[1] if columns is None else columns.shape[0]
    return x.new_empty(output_rows.shape[0], x.shape[1]), x.new_empty(context_rows.shape[0], width)


@torch.library.custom_op("sparselora::put_rows", mutates_args=())
def put_rows(
    output: Tensor,
    context: Tensor,
    output_rows: Tensor,
    context_rows: Tensor,
    columns: Tensor | None = None,
    provider: str = REFERENCE,
    tokens: int | None = None,
) -> Tensor:
    """Merge what `take_rows` split; context channels outside `columns` are zero.

    Args:
        output: (n, C).
        context: (N - n, k or C), of the dtype of `output`.
        output_rows: (n,) int64.
        context_rows: (N - n,) int64.
        columns: (k,) int64, distinct, or None.
        provider: a name of `PUT_ROWS`.
        tokens: N where the rows are those of `token_slots`; None: no slot is spare, so that it is known.

    Returns:
        (N, C).
    """
    return PUT_ROWS[provider](output, context, output_rows, context_rows, columns, tokens)  # type: ignore[return-value]


@put_rows.register_fake
def _(
    output: Tensor,
    context: Tensor,
    output_rows: Tensor,
    context_rows: Tensor,
    columns: Tensor | None = None,
    provider: str = REFERENCE,
    tokens: int | None = None,
) -> Tensor:
    assert output.dtype == context.dtype, f"put_rows: output is {output.dtype}, context is {context.dtype}"
    rows = output_rows.shape[0] + context_rows.shape[0] if tokens is None else tokens
    return output.new_empty(rows, output.shape[1])


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *_, output_rows, context_rows, columns, provider, tokens = inputs
    ctx.save_for_backward(output_rows, context_rows, columns)
    ctx.provider, ctx.tokens = provider, tokens


def _take_rows_backward(ctx: Any, d_output: Tensor, d_context: Tensor) -> tuple[Tensor | None, ...]:
    d_x = put_rows(d_output, d_context, *ctx.saved_tensors, ctx.provider, ctx.tokens)
    return d_x, None, None, None, None, None


def _put_rows_backward(ctx: Any, d_merged: Tensor) -> tuple[Tensor | None, ...]:
    output_rows, context_rows, columns = ctx.saved_tensors
    d_output, d_context = take_rows(d_merged, output_rows, context_rows, columns, ctx.provider, ctx.tokens)
    if ctx.tokens is not None:
        # Nothing reads a spare slot: without this its row would count twice in the gradient of every weight.
        d_output = reference.without_spare_slots(d_output, output_rows)
        d_context = reference.without_spare_slots(d_context, context_rows)
    return d_output, d_context, None, None, None, None, None


take_rows.register_autograd(_take_rows_backward, setup_context=_save_rows)
put_rows.register_autograd(_put_rows_backward, setup_context=_save_rows)


@torch.library.custom_op("sparselora::expand_kv_channels", mutates_args=())
def expand_kv_channels(channels: Tensor, head_dim: int, groups: int) -> Tensor:
    """Map kept key/value channels to the query channels that read them; see `reference.expand_kv_channels`."""
    return reference.expand_kv_channels(channels, head_dim, groups)


@expand_kv_channels.register_fake
def _(channels: Tensor, head_dim: int, groups: int) -> Tensor:
    return channels.new_empty(channels.shape[0] * groups)
