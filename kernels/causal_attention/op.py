"""A semantic op for softmax attention of which no query reads a later key.

    causal_attention(q, k, v, M, s) = softmax(s q k' + M) v          M is -inf wherever the key comes after the query

The mask may forbid more than that (padding, other sequences of a packed batch, a window), so it is an operand all the
same; what the op knows beyond `scaled_dot_product_attention` is that scores above the diagonal need not be computed.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from sparse_compile.kernels.causal_attention import cpu, reference
from sparse_compile.kernels.dtypes import at_least_fp32
from sparse_compile.kernels.providers import REFERENCE, Provider, ProviderTable, cpu_only

CAUSAL_ATTENTION = ProviderTable(
    "causal_attention", reference.causal_attention, Provider("cpu_blocks", cpu.causal_attention, cpu_only)
)
CAUSAL_ATTENTION_BACKWARD = ProviderTable(
    "causal_attention_backward",
    reference.causal_attention_backward,
    Provider("cpu_blocks", cpu.causal_attention_backward, cpu_only),
)


@torch.library.custom_op("sparselora::causal_attention", mutates_args=())
def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, provider: str = REFERENCE
) -> tuple[Tensor, Tensor]:
    """Compute attention whose mask forbids every later key.

    Args:
        query: (B, H, S, D).
        key: (B, H, S, D).
        value: (B, H, S, D).
        mask: (B or 1, H or 1, S, S), added to the scores; -inf above the diagonal at least. Not differentiated.
        scale: s.
        provider: a name of `CAUSAL_ATTENTION`.

    Returns:
        `(out, logsumexp)`: (B, H, S, D) laid out as (B, S, H, D), and (B, H, S) of the score dtype.
    """
    out, logsumexp = cast("tuple[Tensor, Tensor]", CAUSAL_ATTENTION[provider](query, key, value, mask, scale))
    return by_token(out), logsumexp.contiguous()


@causal_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, provider: str = REFERENCE
) -> tuple[Tensor, Tensor]:
    assert query.dtype == key.dtype == value.dtype, "causal_attention: operands of several dtypes"
    return empty_by_token(query), query.new_empty(query.shape[:3], dtype=at_least_fp32(query))


@torch.library.custom_op("sparselora::causal_attention_backward", mutates_args=())
def causal_attention_backward(
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    mask: Tensor,
    scale: float,
    provider: str = REFERENCE,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value; shapes as for `causal_attention`."""
    run = CAUSAL_ATTENTION_BACKWARD[provider]
    gradients = cast("tuple[Tensor, ...]", run(d_out, query, key, value, out, logsumexp, mask, scale))
    d_query, d_key, d_value = (by_token(gradient) for gradient in gradients)
    return d_query, d_key, d_value


@causal_attention_backward.register_fake
def _(
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    mask: Tensor,
    scale: float,
    provider: str = REFERENCE,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_by_token(query), empty_by_token(key), empty_by_token(value)


def by_token(x: Tensor) -> Tensor:
    """Lay (B, H, S, D) out as (B, S, H, D), which the views around attention cost nothing for."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def empty_by_token(like: Tensor, width: int | torch.SymInt | None = None) -> Tensor:
    """Return (B, H, S, width) laid out as (B, S, H, width), of another tensor's sizes but the one that is given."""
    batch, heads, length, own = like.shape
    return like.new_empty(batch, length, heads, own if width is None else width).transpose(1, 2)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, mask, scale, provider = inputs
    ctx.save_for_backward(query, key, value, *output, mask)
    ctx.scale, ctx.provider = scale, provider
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_out is None:
        return None, None, None, None, None, None
    gradients = causal_attention_backward(d_out, *ctx.saved_tensors, ctx.scale, ctx.provider)
    return *gradients, None, None, None


causal_attention.register_autograd(_backward, setup_context=_save)
