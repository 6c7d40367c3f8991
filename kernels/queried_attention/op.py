"""A semantic op for the attention of some queries over all keys: those of the tokens that go on computing.

    queried_attention(q, k, v, M, slots, s)[:, :, i] = softmax(s q_i k' + M_i) v      for each i in `slots`, else 0

Context tokens that have left the residual stream are read as keys and values, and ask nothing themselves. `query_slots`
finds the queries that are left, as many slots in each sequence as the one with most of them needs.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from sparse_compile.kernels.causal_attention.op import by_token, empty_by_token
from sparse_compile.kernels.dtypes import at_least_fp32
from sparse_compile.kernels.providers import REFERENCE, Provider, ProviderTable, cpu_only
from sparse_compile.kernels.queried_attention import cpu, reference
from sparse_compile.torch_private.fake import new_unbacked_size

QUERIED_ATTENTION = ProviderTable(
    "queried_attention",
    reference.queried_attention,
    Provider("cpu_sequences", cpu.queried_attention, cpu_only),
)
QUERIED_ATTENTION_BACKWARD = ProviderTable(
    "queried_attention_backward",
    reference.queried_attention_backward,
    Provider("cpu_sequences", cpu.queried_attention_backward, cpu_only),
)


@torch.library.custom_op("sparselora::query_slots", mutates_args=())
def query_slots(output_mask: Tensor, size: int | None = None) -> Tensor:
    """Return the positions of the queries of each sequence.

    Args:
        output_mask: (B, S) bool, true at the queries.
        size: slots of a sequence; None: as many as the sequence with most queries has, for which this waits for the
            device.

    Returns:
        (B, N) int64: ascending positions, then -1 in spare slots.
    """
    if size is None:
        size = int(output_mask.sum(1).max()) if output_mask.numel() else 0
    return reference.query_slots(output_mask, size)


@query_slots.register_fake
def _(output_mask: Tensor, size: int | None = None) -> Tensor:
    slots = new_unbacked_size(max_size=output_mask.shape[1]) if size is None else size
    return output_mask.new_empty(output_mask.shape[0], slots, dtype=torch.int64)


@torch.library.custom_op("sparselora::queried_attention", mutates_args=())
def queried_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    slots: Tensor,
    is_causal: bool,
    scale: float,
    provider: str = REFERENCE,
) -> tuple[Tensor, Tensor]:
    """Compute attention for some queries.

    Args:
        query: (B, H, S, D).
        key: (B, G, S, D); query head h reads key/value head h // (H / G).
        value: (B, G, S, E).
        mask: (B or 1, H or 1, S, S), bool (true where a key may be read) or added to the scores; or None. Not
            differentiated.
        slots: (B, N) int64, the positions of the queries that are wanted, -1 in spare slots.
        is_causal: whether no query reads a later key.
        scale: s.
        provider: a name of `QUERIED_ATTENTION`.

    Returns:
        `(out, logsumexp)`: (B, H, S, E) laid out as (B, S, H, E), zero at other queries; and (B, H, S) of the score
        dtype.
    """
    run = QUERIED_ATTENTION[provider]
    out, logsumexp = cast("tuple[Tensor, Tensor]", run(query, key, value, mask, slots, is_causal, scale))
    return by_token(out), logsumexp.contiguous()


@queried_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    slots: Tensor,
    is_causal: bool,
    scale: float,
    provider: str = REFERENCE,
) -> tuple[Tensor, Tensor]:
    assert query.dtype == key.dtype == value.dtype, "queried_attention: operands of several dtypes"
    out = empty_by_token(query, value.shape[-1])
    return out, query.new_empty(query.shape[:3], dtype=at_least_fp32(query))


@torch.library.custom_op("sparselora::queried_attention_backward", mutates_args=())
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
    provider: str = REFERENCE,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value; shapes as for `queried_attention`."""
    run = QUERIED_ATTENTION_BACKWARD[provider]
    operands = (d_out, query, key, value, out, logsumexp, mask, slots, is_causal, scale)
    d_query, d_key, d_value = (by_token(each) for each in cast("tuple[Tensor, ...]", run(*operands)))
    return d_query, d_key, d_value


@queried_attention_backward.register_fake
def _(
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
    provider: str = REFERENCE,
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(empty_by_token(each) for each in (query, key, value))  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, mask, slots, *ctx.constants = inputs
    ctx.save_for_backward(query, key, value, *output, mask, slots)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_out is None:
        return (None,) * 8
    gradients = queried_attention_backward(d_out, *ctx.saved_tensors, *ctx.constants)
    return *gradients, None, None, None, None, None


queried_attention.register_autograd(_backward, setup_context=_save)
