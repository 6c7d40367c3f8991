"""A frozen weight that is stored in fewer bits than it is multiplied in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_compile.graph.sites import NodeName
from sparse_compile.kernels.dequantize_4bit import dequantize_4bit


@dataclass(frozen=True)
class QuantizedWeight:
    """A frozen weight that is stored in 4 bits, and what it takes to dequantise it.

    Attributes:
        path: of its packed parameter, such as `"layers.0.mlp.up_proj.weight"`.
        operands: placeholders of the packed data and of its scales, as `sparselora::dequantize_4bit` takes them.
        values: the live tensors of the operands.
        shape: (out, in).
        blocksize: elements that share a scale.
        quant_type: `"nf4"` or `"fp4"`.
        dtype: what the layer computes in, and the dtype of the dense weight.
    """

    path: str
    operands: tuple[NodeName | None, ...]
    values: tuple[Tensor | None, ...]
    shape: tuple[int, int]
    blocksize: int
    quant_type: str
    dtype: torch.dtype

    def dense(self) -> Tensor:
        """Return the weight, (out, in), a fresh tensor."""
        packed, absmax, *nested = self.values
        form = list(self.shape), self.blocksize, self.quant_type, self.dtype
        with torch.no_grad():
            dense: Tensor = dequantize_4bit(packed, absmax, *nested, *form)
        return dense

    @property
    def device(self) -> torch.device:
        """Where it is stored."""
        packed = self.values[0]
        assert packed is not None
        return packed.device
