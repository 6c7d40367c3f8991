"""The norm of each row of a frozen weight and the low-rank product beside it, as DoRA asks for it."""

from sparse_compile.kernels.dora_norm.op import dora_norm

__all__ = ["dora_norm"]
