"""The specification of token split and merge, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def split_tokens(output_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the indices of the output tokens and of the context tokens, each ascending.

    Args:
        output_mask: bool, any shape with N elements.
    """
    flat = output_mask.reshape(-1)
    return flat.nonzero().squeeze(1), flat.logical_not().nonzero().squeeze(1)


def take_rows(x: Tensor, output_rows: Tensor, context_rows: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return `x[output_rows]` and `x[context_rows]` (of the latter only `columns`, where given)."""
    context = x[context_rows]
    return x[output_rows], context if columns is None else context[:, columns]


def put_rows(
    output: Tensor, context: Tensor, output_rows: Tensor, context_rows: Tensor, columns: Tensor | None
) -> Tensor:
    """Return the (N, C) tensor that `take_rows` splits into `output` and `context`; zero where it reads nothing."""
    merged = output.new_zeros(output_rows.numel() + context_rows.numel(), output.shape[1])
    merged[output_rows] = output
    if columns is None:
        merged[context_rows] = context
    else:
        merged[context_rows.unsqueeze(1), columns.unsqueeze(0)] = context
    return merged


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
