"""Softmax attention of some queries over all keys."""

from sparse_compile.kernels.queried_attention.op import (
    QUERIED_ATTENTION,
    QUERIED_ATTENTION_BACKWARD,
    queried_attention,
    queried_attention_backward,
    query_slots,
)

__all__ = [
    "QUERIED_ATTENTION",
    "QUERIED_ATTENTION_BACKWARD",
    "queried_attention",
    "queried_attention_backward",
    "query_slots",
]
