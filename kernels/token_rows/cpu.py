"""Token split and merge on a CPU: row copies by `index_select` and `index_copy_`, which are vectorised over a row."""

from __future__ import annotations

from torch import Tensor

from sparse_compile.kernels.token_rows.reference import past_the_end


def take_rows(
    x: Tensor, output_rows: Tensor, context_rows: Tensor, columns: Tensor | None, tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """See `reference.take_rows`."""
    if tokens is not None:
        output_rows, context_rows = output_rows.clamp_min(0), context_rows.clamp_min(0)
    context = x.index_select(0, context_rows)
    return x.index_select(0, output_rows), context if columns is None else context.index_select(1, columns)


def put_rows(
    output: Tensor,
    context: Tensor,
    output_rows: Tensor,
    context_rows: Tensor,
    columns: Tensor | None,
    tokens: int | None = None,
) -> Tensor:
    """See `reference.put_rows`; each row is written once, and only columns that are not kept are zeroed."""
    width = output.shape[1]
    rows = output_rows.numel() + context_rows.numel() if tokens is None else tokens + 1
    if tokens is not None:
        output_rows, context_rows = past_the_end(output_rows, tokens), past_the_end(context_rows, tokens)
    if columns is not None:
        context = context.new_zeros(context.shape[0], width).index_copy_(1, columns, context)
    merged = output.new_empty(rows, width)
    merged.index_copy_(0, output_rows, output).index_copy_(0, context_rows, context)
    return merged if tokens is None else merged.narrow(0, 0, tokens)
