"""The product with a frozen weight."""

from sparse_compile.kernels.frozen_linear.op import FROZEN_LINEAR, frozen_linear

__all__ = ["FROZEN_LINEAR", "frozen_linear"]
