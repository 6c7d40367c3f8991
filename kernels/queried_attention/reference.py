"""The specification of attention of some queries, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.kernels.causal_attention.reference import causal_attention as attention
from sparse_compile.kernels.causal_attention.reference import causal_attention_backward as attention_backward
from sparse_compile.kernels.dtypes import at_least_fp32


def query_slots(output_mask: Tensor, size: int) -> Tensor:
    """Return the positions of the true elements of each row of a mask (B, S), ascending, then -1: (B, size)."""
    order = output_mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :size]
    slots = order.masked_fill(output_mask.gather(1, order).logical_not(), -1)
    return torch.nn.functional.pad(slots, (0, max(0, size - slots.shape[1])), value=-1)


def queried_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, slots: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Return softmax(s q k' + mask) v of the queries in `slots`, zeros elsewhere; and the logarithmic denominators.

    A query that reads no key at all gets zeros, and minus infinity.
    """
    wanted = queried(slots, query.shape[2])[:, None]
    out, logsumexp = attention(*_wide(query, key, value), _added(query, mask, is_causal), scale)
    return out.to(query.dtype).where(wanted[..., None], 0.0), logsumexp.where(wanted, 0.0)


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
    """Return the gradients of query, key and value; the weights are computed again from `logsumexp`."""
    # To whoever asks nothing, no key has a weight.
    logsumexp = logsumexp.where(queried(slots, query.shape[2])[:, None], float("-inf"))
    operands = (d_out, *_wide(query, key, value), out, logsumexp, _added(query, mask, is_causal), scale)
    d_query, d_key, d_value = attention_backward(*operands)
    return (
        d_query.to(query.dtype),
        summed_over_groups(d_key, key.shape[1]).to(key.dtype),
        summed_over_groups(d_value, key.shape[1]).to(value.dtype),
    )


def queried(slots: Tensor, length: int) -> Tensor:
    """Return which queries `slots` names, (B, S) bool."""
    marks = torch.zeros(slots.shape[0], length + 1, dtype=torch.bool, device=slots.device)
    return marks.scatter(1, slots.where(slots >= 0, length), True)[:, :length]


def summed_over_groups(gradient: Tensor, heads: int) -> Tensor:
    """Add up the gradients of the copies of each key/value head: (B, H, S, D) to (B, heads, S, D)."""
    return (
        gradient
        if gradient.shape[1] == heads
        else gradient.reshape(len(gradient), heads, -1, *gradient.shape[2:]).sum(2)
    )


def repeated_heads(x: Tensor, heads: int) -> Tensor:
    """Return keys or values for each of the query heads: (B, G, S, D) to (B, heads, S, D)."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _wide(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the operands with a key and a value for each query, in the score dtype: rounded once, at the end."""
    wide, heads = at_least_fp32(query), query.shape[1]
    return query.to(wide), repeated_heads(key, heads).to(wide), repeated_heads(value, heads).to(wide)


def _added(query: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """Return what is added to the scores, broadcast to (B, H, S, S)."""
    length = query.shape[2]
    added = query.new_zeros(length, length, dtype=at_least_fp32(query))
    if is_causal:
        added = added.masked_fill(torch.ones_like(added, dtype=torch.bool).triu(1), float("-inf"))
    if mask is None:
        return added
    if mask.dtype == torch.bool:
        return added.expand(*mask.shape).masked_fill(mask.logical_not(), float("-inf"))
    return added + mask
