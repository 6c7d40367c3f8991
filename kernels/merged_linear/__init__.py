"""A frozen linear layer and its adapter as one product, in the order of association that is cheapest."""

from __future__ import annotations

from sparse_compile.kernels.merged_linear.op import merged_input_gradient, merged_linear

__all__ = ["merged_input_gradient", "merged_linear"]
