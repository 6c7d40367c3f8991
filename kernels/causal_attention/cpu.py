"""Causal attention on a CPU: blocks of queries by PyTorch's fused kernel, each with the keys up to its last query.

The fused kernel takes keys 512 at a time, and computes all scores of a block of keys that any of its queries may read:
for 512 tokens causality saves nothing, and with a mask it never does. Four blocks of queries, each a call of its own
that sees fewer keys, compute 10 of 16 scores: 0.75 of the time for 512 tokens, 0.7 for 2048 (two cores of an EPYC).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sparse_compile.kernels.dtypes import at_least_fp32
from sparse_compile.torch_private.aten import cpu_flash_attention, cpu_flash_attention_backward

BLOCKS = 4
"""Blocks of queries; more of them save fewer scores each and make the products narrower."""

_LEAST_QUERIES = 64


def causal_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """See `reference.causal_attention`."""
    query, key, value = (side_by_side(each) for each in (query, key, value))
    outs, denominators = [], []
    for rows, keys in _blocks(query.shape[2]):
        operands = query[:, :, rows], key[:, :, keys], value[:, :, keys]
        out, logsumexp = cpu_flash_attention(*operands, mask[..., rows, keys], scale)
        outs.append(out)
        denominators.append(logsumexp)
    return _joined(outs), torch.cat(denominators, 2)


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
    """See `reference.causal_attention_backward`; gradients of keys and values are added up in fp32 at least."""
    d_out, query, key, value, out = (side_by_side(each) for each in (d_out, query, key, value, out))
    d_queries = []
    wide = at_least_fp32(key)
    d_key, d_value = (torch.zeros_like(each, dtype=wide) for each in (key, value))
    for rows, keys in _blocks(query.shape[2]):
        d_query, d_k, d_v = cpu_flash_attention_backward(
            d_out[:, :, rows],
            query[:, :, rows],
            key[:, :, keys],
            value[:, :, keys],
            out[:, :, rows],
            logsumexp[:, :, rows],
            mask[..., rows, keys],
            scale,
        )
        d_queries.append(d_query)
        d_key[:, :, keys] += d_k
        d_value[:, :, keys] += d_v
    return _joined(d_queries), d_key.to(key.dtype), d_value.to(value.dtype)


def side_by_side(x: Tensor) -> Tensor:
    """Return a tensor whose channels stand side by side: the fused kernel reads no stride of theirs."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _joined(blocks: list[Tensor]) -> Tensor:
    """Put blocks of queries together, laid out as (B, S, H, D) like each of them."""
    return torch.cat([block.transpose(1, 2) for block in blocks], 1).transpose(1, 2)


def block_count(queries: int) -> int:
    """Return in how many blocks so many queries are computed."""
    return max(1, min(BLOCKS, queries // _LEAST_QUERIES))


def _blocks(length: int) -> Iterator[tuple[slice, slice]]:
    """Yield the queries of each block, and the keys up to the last of them."""
    count = block_count(length)
    ends = [length * (block + 1) // count for block in range(count)]
    for start, end in zip([0, *ends], ends, strict=False):
        yield slice(start, end), slice(0, end)
