"""The specification of causal attention, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from sparse_compile.kernels.dtypes import at_least_fp32


def causal_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return softmax(s q k' + mask) v, (B, H, S, D), and the logarithm of the softmax's denominators, (B, H, S).

    A query that reads no key at all gets zeros, and minus infinity.
    """
    scores = _scores(query, key, mask, scale)
    logsumexp = scores.logsumexp(-1)
    return (_weights(scores, logsumexp) @ value.to(scores.dtype)).to(query.dtype), logsumexp


def causal_attention_backward(
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    mask: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value; the weights are computed again from `logsumexp`."""
    scores = _scores(query, key, mask, scale)
    weights = _weights(scores, logsumexp)
    q, k, v, o, d = (each.to(scores.dtype) for each in (query, key, value, out, d_out))
    d_scores = scale * weights * (d @ v.mT - (d * o).sum(-1, keepdim=True))
    gradients = (d_scores @ k, d_scores.mT @ q, weights.mT @ d)
    return tuple(gradient.to(query.dtype) for gradient in gradients)  # type: ignore[return-value]


def _scores(query: Tensor, key: Tensor, mask: Tensor, scale: float) -> Tensor:
    dtype = at_least_fp32(query)
    return scale * (query.to(dtype) @ key.to(dtype).mT) + mask


def _weights(scores: Tensor, logsumexp: Tensor) -> Tensor:
    nothing_read = (logsumexp == float("-inf")).unsqueeze(-1)
    return (scores - logsumexp.unsqueeze(-1)).exp().masked_fill(nothing_read, 0.0)
