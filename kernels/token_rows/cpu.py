"""Token split and merge on a CPU: row copies by `index_select` and `index_copy_`, which are vectorised over a row."""

from __future__ import annotations

from torch import Tensor


def take_rows(x: Tensor, output_rows: Tensor, context_rows: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `reference.take_rows`."""
    context = x.index_select(0, context_rows)
    return x.index_select(0, output_rows), context if columns is None else context.index_select(1, columns)


def put_rows(
    output: Tensor, context: Tensor, output_rows: Tensor, context_rows: Tensor, columns: Tensor | None
) -> Tensor:
    """See `reference.put_rows`; each row is written once, and only columns that are not kept are zeroed."""
    tokens, width = output_rows.numel() + context_rows.numel(), output.shape[1]
    if columns is not None:
        context = context.new_zeros(context.shape[0], width).index_copy_(1, columns, context)
    merged = output.new_empty(tokens, width)
    return merged.index_copy_(0, output_rows, output).index_copy_(0, context_rows, context)
