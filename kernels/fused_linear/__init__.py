"""Gathered products of frozen weights, thin products of adapters and an elementwise formula of them, in one op."""

from sparse_compile.kernels.fused_linear.op import FUSED_LINEAR, fused_linear, fused_linear_gradients

__all__ = ["FUSED_LINEAR", "fused_linear", "fused_linear_gradients"]
