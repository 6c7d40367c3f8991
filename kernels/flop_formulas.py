"""FLOPs of the ops that are products, for `torch.utils.flop_counter`.

AOTAutograd's partitioner asks it what a recomputation costs (`activation_memory_budget`): an op that it does not know
counts as free, and the dense products of a model would be the first to be computed twice.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from sparse_compile.kernels import (  # noqa: F401  (registers the ops)
    causal_attention,
    frozen_linear,
    fused_linear,
    gathered_linear,
    queried_attention,
)

_OPS = torch.ops.sparselora


@register_flop_formula([_OPS.frozen_linear, _OPS.gathered_linear, _OPS.gathered_input_linear])
def _product(x: torch.Size, *_: Any, out_shape: torch.Size, **__: Any) -> int:
    """Count a product of `x` (..., inner) whose result is `out_shape` (..., columns)."""
    return 2 * math.prod(out_shape) * x[-1]


@register_flop_formula(_OPS.fused_linear)
def _products(
    xs: list[torch.Size],
    weights: list[torch.Size],
    channels: list[torch.Size],
    reads: list[int],
    dims: list[int],
    thins: list[torch.Size],
    *_: Any,
    out_shape: list[torch.Size],
    **__: Any,
) -> int:
    """Count the frozen products and the thin ones, whose results are all of the shape of the first output."""
    depths = [xs[read][1] for read in reads] + [thin[1] for thin in thins]
    return 2 * math.prod(out_shape[0]) * sum(depths)


@register_flop_formula(_OPS.causal_attention)
def _attention(query: torch.Size, *_: Any, **__: Any) -> int:
    """Count two products of which half of the scores are needed."""
    return 2 * math.prod(query) * query[-2]


@register_flop_formula(_OPS.causal_attention_backward)
def _attention_backward(d_out: torch.Size, *_: Any, **__: Any) -> int:
    """Count the five products of the backward, the scores once more among them."""
    return 5 * math.prod(d_out) * d_out[-2]


@register_flop_formula(_OPS.queried_attention)
def _queried_attention(
    query: torch.Size, key: torch.Size, value: torch.Size, mask: Any, slots: torch.Size, *_: Any, **__: Any
) -> int:
    """Count two products for the queries that have a slot."""
    return 2 * math.prod(slots) * query[1] * key[2] * (query[3] + value[3])


@register_flop_formula(_OPS.queried_attention_backward)
def _queried_attention_backward(
    d_out: torch.Size,
    query: torch.Size,
    key: torch.Size,
    value: torch.Size,
    out: Any,
    logsumexp: Any,
    mask: Any,
    slots: torch.Size,
    *_: Any,
    **__: Any,
) -> int:
    """Count the five products of the backward, the scores once more among them."""
    return math.prod(slots) * query[1] * key[2] * (6 * query[3] + 4 * value[3])
