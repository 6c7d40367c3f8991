"""The specification of token split and merge, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def row_counts(output_mask: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Return how many output tokens there are, and how many targets that are not ignored: (2,) int64 on the CPU."""
    counts = [output_mask.sum(), (target != ignore_index).sum()]
    if counts[0].device == counts[1].device:
        return torch.stack(counts).cpu()
    return torch.stack([count.cpu() for count in counts])


def split_tokens(output_mask: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the indices of the output tokens and of the context tokens, each ascending.

    Args:
        output_mask: bool, any shape with N elements.
        counts: what `row_counts` returns, where it is known.
    """
    flat = output_mask.reshape(-1)
    outputs = flat.nonzero().squeeze(1) if counts is None else fill_slots(flat, int(counts[0]))
    # The rest is as many as are left: asking a GPU for them as well would wait for it once more.
    return outputs, fill_slots(flat.logical_not(), flat.numel() - outputs.numel())


def token_slots(output_mask: Tensor, outputs: int, contexts: int) -> tuple[Tensor, Tensor]:
    """Return what `split_tokens` does in vectors of fixed sizes; nothing of it waits for the device.

    Args:
        output_mask: bool, any shape with N elements.
        outputs: size of the first vector; output tokens beyond it are left out.
        contexts: size of the second; likewise.

    Returns:
        `(output_rows, context_rows)`: ascending indices, then -1 in the spare slots.
    """
    flat = output_mask.reshape(-1)
    return fill_slots(flat, outputs), fill_slots(flat.logical_not(), contexts)


def fill_slots(marked: Tensor, slots: int) -> Tensor:
    """Return the indices of the marked elements of a bool vector, ascending, in (slots,); -1 where none is left."""
    place = marked.cumsum(0) - 1
    # What is not marked, or has no slot, goes into one more slot, which is cut off.
    place = torch.where(marked & (place < slots), place, slots)
    rows = place.new_full((slots + 1,), -1)
    return rows.scatter_(0, place, torch.arange(marked.numel(), device=marked.device)).narrow(0, 0, slots)


def take_rows(
    x: Tensor, output_rows: Tensor, context_rows: Tensor, columns: Tensor | None, tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return `x[output_rows]` and `x[context_rows]` (of the latter only `columns`, where given)."""
    if tokens is not None:
        # A spare slot holds a real row, so that whatever is computed of it is finite where that row's own values are.
        output_rows, context_rows = output_rows.clamp_min(0), context_rows.clamp_min(0)
    context = x[context_rows]
    return x[output_rows], context if columns is None else context[:, columns]


def put_rows(
    output: Tensor,
    context: Tensor,
    output_rows: Tensor,
    context_rows: Tensor,
    columns: Tensor | None,
    tokens: int | None = None,
) -> Tensor:
    """Return the (N, C) tensor that `take_rows` splits into `output` and `context`; zero where it reads nothing."""
    if tokens is not None:
        output_rows, context_rows = past_the_end(output_rows, tokens), past_the_end(context_rows, tokens)
    rows = output_rows.numel() + context_rows.numel() if tokens is None else tokens + 1
    merged = output.new_zeros(rows, output.shape[1])
    merged[output_rows] = output
    if columns is None:
        merged[context_rows] = context
    else:
        merged[context_rows.unsqueeze(1), columns.unsqueeze(0)] = context
    return merged if tokens is None else merged.narrow(0, 0, tokens)


def past_the_end(rows: Tensor, tokens: int) -> Tensor:
    """Point spare slots at the row behind the last token, which is cut off."""
    return torch.where(rows < 0, tokens, rows)


def without_spare_slots(gradient: Tensor, rows: Tensor) -> Tensor:
    """Return the gradient (R, ...) of slots with these `rows` (R,), zero in spare ones: nobody reads what they hold."""
    return gradient.masked_fill((rows < 0).reshape(-1, *[1] * (gradient.dim() - 1)), 0)


def expand_kv_channels(channels: Tensor, head_dim: int, groups: int) -> Tensor:
    """Map kept key/value channels to the channels of the query heads that read them, ascending.

    Query head h reads key/value head h // groups, so kv channel (head j, channel d) is channel d of the query heads
    j*groups .. j*groups+groups-1.

    Args:
        channels: (k,) int64 in [0, kv_heads * head_dim).
        head_dim: channels of one head.
        groups: query heads per key/value head.

    Returns:
        (k * groups,) int64 in [0, kv_heads * groups * head_dim).
    """
    heads = (channels // head_dim * groups).unsqueeze(1) + torch.arange(groups, device=channels.device)
    return (heads * head_dim + (channels % head_dim).unsqueeze(1)).reshape(-1).sort().values
