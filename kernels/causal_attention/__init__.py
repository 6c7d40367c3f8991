"""Softmax attention of which no query reads a later key."""

from sparse_compile.kernels.causal_attention.op import (
    CAUSAL_ATTENTION,
    CAUSAL_ATTENTION_BACKWARD,
    causal_attention,
    causal_attention_backward,
)

__all__ = ["CAUSAL_ATTENTION", "CAUSAL_ATTENTION_BACKWARD", "causal_attention", "causal_attention_backward"]
