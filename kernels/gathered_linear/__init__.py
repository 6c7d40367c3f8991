"""Products with a frozen weight of which only some rows or columns are used."""

from sparse_compile.kernels.gathered_linear.op import (
    GATHERED_INPUT_LINEAR,
    GATHERED_LINEAR,
    gathered_input_linear,
    gathered_linear,
)

__all__ = ["GATHERED_INPUT_LINEAR", "GATHERED_LINEAR", "gathered_input_linear", "gathered_linear"]
