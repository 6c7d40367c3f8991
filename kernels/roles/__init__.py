"""Token roles as ops."""

from sparse_compile.kernels.roles.op import given_output_mask, output_mask, shuffled_mask

__all__ = ["given_output_mask", "output_mask", "shuffled_mask"]
