"""The specification of attention of some queries, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

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
    scores = _scores(query, key, mask, is_causal, scale)
    wanted = queried(slots, query.shape[2])
    logsumexp = scores.logsumexp(-1)
    out = _weights(scores, logsumexp, wanted) @ _repeated(value, query).to(scores.dtype)
    return out.to(query.dtype), logsumexp.where(wanted[:, None], 0.0)


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
    scores = _scores(query, key, mask, is_causal, scale)
    weights = _weights(scores, logsumexp, queried(slots, query.shape[2]))
    q, k, v, o, d = (
        each.to(scores.dtype) for each in (query, _repeated(key, query), _repeated(value, query), out, d_out)
    )
    d_scores = scale * weights * (d @ v.mT - (d * o).sum(-1, keepdim=True))
    d_query, d_key, d_value = d_scores @ k, d_scores.mT @ q, weights.mT @ d
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


def _repeated(x: Tensor, query: Tensor) -> Tensor:
    return x if x.shape[1] == query.shape[1] else x.repeat_interleave(query.shape[1] // x.shape[1], 1)


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    dtype = at_least_fp32(query)
    scores = scale * (query.to(dtype) @ _repeated(key, query).to(dtype).mT)
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
    if mask is None:
        return scores
    return scores.masked_fill(mask.logical_not(), float("-inf")) if mask.dtype == torch.bool else scores + mask


def _weights(scores: Tensor, logsumexp: Tensor, wanted: Tensor) -> Tensor:
    reads_nothing = (logsumexp == float("-inf")) | wanted[:, None].logical_not()
    weights = (scores - logsumexp.unsqueeze(-1)).exp()
    return weights.masked_fill(reads_nothing.unsqueeze(-1), 0.0)
