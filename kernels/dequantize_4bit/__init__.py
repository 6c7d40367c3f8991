"""The dense form of a weight that bitsandbytes holds in 4 bits, or of some of its rows or columns."""

from sparse_compile.kernels.dequantize_4bit.op import dequantize_4bit

__all__ = ["dequantize_4bit"]
