"""A pruned linear layer and its adapter as one product with a weight that keeps its zeros (LoRS, arXiv 2501.08582)."""

from __future__ import annotations

from sparse_compile.kernels.masked_linear.op import (
    MASKED_LINEAR,
    masked_factor_gradients,
    masked_input_gradient,
    masked_linear,
)
from sparse_compile.kernels.masked_linear.reference import masked_weight

__all__ = [
    "MASKED_LINEAR",
    "masked_factor_gradients",
    "masked_input_gradient",
    "masked_linear",
    "masked_weight",
]
