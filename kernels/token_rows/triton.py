"""Token split and merge on an NVIDIA GPU: one kernel for both roles, channels picked and placed on the way.

Run under Triton's interpreter and compiled ahead of time in tests; not yet measured on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.kernels.triton_launch import on_device_of


def take_rows(
    x: Tensor, output_rows: Tensor, context_rows: Tensor, columns: Tensor | None, tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """See `reference.take_rows`."""
    from sparse_compile.kernels.token_rows.triton_kernels import take

    outputs, width = output_rows.numel(), x.shape[1]
    kept = width if columns is None else columns.numel()
    output, context = x.new_empty(outputs, width), x.new_empty(context_rows.numel(), kept)
    if x.numel():
        grid, block = launch_sizes(outputs + context_rows.numel(), width)
        with on_device_of(x):
            take[grid](
                x, output_rows, context_rows, columns, output, context, outputs, width, kept, *x.stride(),
                HAS_COLUMNS=columns is not None, BLOCK=block,
            )  # fmt: skip
    return output, context


def put_rows(
    output: Tensor,
    context: Tensor,
    output_rows: Tensor,
    context_rows: Tensor,
    columns: Tensor | None,
    tokens: int | None = None,
) -> Tensor:
    """See `reference.put_rows`."""
    from sparse_compile.kernels.token_rows.triton_kernels import put

    outputs, width = output_rows.numel(), output.shape[1]
    slots = outputs + context_rows.numel()
    merged = output.new_empty(slots if tokens is None else tokens, width)
    places = None
    if columns is not None:
        places = columns.new_full((width,), -1, dtype=torch.int32)
        places[columns] = torch.arange(columns.numel(), device=columns.device, dtype=torch.int32)
    if merged.numel():
        grid, block = launch_sizes(slots, width)
        with on_device_of(output):
            put[grid](
                output, context, output_rows, context_rows, places, merged, outputs, width, *output.stride(),
                *context.stride(), HAS_COLUMNS=columns is not None, BLOCK=block,
            )  # fmt: skip
    return merged


def launch_sizes(rows: int, width: int) -> tuple[tuple[int, int], int]:
    """Return the grid of a copy of rows, and the channels that a program copies: a power of two."""
    block = min(2048, max(16, 1 << (width - 1).bit_length()))
    return (rows, -(-width // block)), block
