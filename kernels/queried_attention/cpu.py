"""Attention of some queries on a CPU: a sequence at a time, by PyTorch's fused kernel.

The queries of a sequence are cut into blocks, each of which sees the keys up to the last one that any of its queries
may read: so causality and the padding at the end of a sequence save scores, as in `causal_attention`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_compile.kernels.causal_attention.cpu import block_count, side_by_side
from sparse_compile.kernels.dtypes import at_least_fp32
from sparse_compile.kernels.queried_attention.reference import repeated_heads, summed_over_groups
from sparse_compile.torch_private.aten import cpu_flash_attention, cpu_flash_attention_backward


@dataclass(frozen=True)
class _Block:
    """Some queries of one sequence, and the keys that they may read.

    Attributes:
        sequence: its place in the batch.
        rows: the positions of the queries, (n,).
        keys: how many keys there are to read, from the first on.
        mask: (1, H or 1, n, keys), added to the scores; None where there is nothing to forbid.
    """

    sequence: int
    rows: Tensor
    keys: int
    mask: Tensor | None


def queried_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, slots: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """See `reference.queried_attention`."""
    batch, heads, length, width = query.shape
    out = query.new_zeros(batch, length, heads, width)
    logsumexp = query.new_zeros(batch, length, heads, dtype=at_least_fp32(query))
    key, value = _for_each_head(key, heads), _for_each_head(value, heads)
    for block in _blocks(query, mask, slots, is_causal):
        operands = (_rows(query, block), _keys(key, block), _keys(value, block))
        found, denominators = cpu_flash_attention(*operands, block.mask, scale)
        out[block.sequence, block.rows] = found[0].transpose(0, 1)
        logsumexp[block.sequence, block.rows] = denominators[0].transpose(0, 1)
    return out.transpose(1, 2), logsumexp.transpose(1, 2)


def queried_attention_backward(
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    mask: Tensor | None,
    slots: Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.queried_attention_backward`; gradients of keys and values are added up in fp32 at least."""
    batch, heads, length, width = query.shape
    d_query = query.new_zeros(batch, length, heads, width)
    wide = at_least_fp32(key)
    d_key, d_value = (query.new_zeros(batch, heads, length, width, dtype=wide) for _ in range(2))
    each_key, each_value = _for_each_head(key, heads), _for_each_head(value, heads)
    for block in _blocks(query, mask, slots, is_causal):
        d_q, d_k, d_v = cpu_flash_attention_backward(
            _rows(d_out, block),
            _rows(query, block),
            _keys(each_key, block),
            _keys(each_value, block),
            _rows(out, block),
            logsumexp[block.sequence, :, block.rows].unsqueeze(0),
            block.mask,
            scale,
        )
        d_query[block.sequence, block.rows] = d_q[0].transpose(0, 1)
        d_key[block.sequence, :, : block.keys] += d_k[0]
        d_value[block.sequence, :, : block.keys] += d_v[0]
    kv_heads = key.shape[1]
    d_key, d_value = (summed_over_groups(each, kv_heads).to(key.dtype) for each in (d_key, d_value))
    return d_query.transpose(1, 2), d_key, d_value


def _blocks(query: Tensor, mask: Tensor | None, slots: Tensor, is_causal: bool) -> Iterator[_Block]:
    """Yield the blocks of queries of each sequence."""
    length, dtype = query.shape[2], at_least_fp32(query)
    for sequence, row in enumerate(slots):
        wanted = row[row >= 0]
        for rows in wanted.tensor_split(block_count(len(wanted))):
            if not len(rows):
                continue
            added, keys = _added(mask, sequence, rows, length, dtype, is_causal)
            if keys:
                yield _Block(sequence, rows, keys, added)


def _added(
    mask: Tensor | None, sequence: int, rows: Tensor, length: int, dtype: torch.dtype, is_causal: bool
) -> tuple[Tensor | None, int]:
    """Return what is added to the scores of some queries, and how many keys they may read, from the first on."""
    added = None
    if mask is not None:
        own = mask[sequence if mask.shape[0] > 1 else 0][:, rows]
        added = own
        if own.dtype == torch.bool:
            added = torch.zeros(own.shape, dtype=dtype).masked_fill_(own.logical_not(), float("-inf"))
    if is_causal:
        later = torch.arange(length)[None, :] > rows[:, None]
        causal = torch.zeros(later.shape, dtype=dtype).masked_fill_(later, float("-inf"))[None]
        added = causal if added is None else added + causal
    if added is None:
        return None, length
    read = (added != float("-inf")).any(0).any(0).nonzero()
    keys = int(read[-1]) + 1 if len(read) else 0
    return added[None, :, :, :keys].to(dtype).contiguous(), keys


def _rows(x: Tensor, block: _Block) -> Tensor:
    return x[block.sequence].transpose(0, 1)[block.rows].transpose(0, 1).unsqueeze(0)


def _keys(x: Tensor, block: _Block) -> Tensor:
    return x[block.sequence : block.sequence + 1, :, : block.keys]


def _for_each_head(x: Tensor, heads: int) -> Tensor:
    """Return keys or values for each query head, as the fused kernel reads them."""
    return side_by_side(repeated_heads(x, heads))
