"""A small sketch of an adapter, from which inner products with others are had without their files.

The sketch of a layer's change D = s B A (out, in) is L D R / k, with L (k, out) and R (in, k) of random signs. The mean
of the product of two sketches is the inner product of the two changes; added up over the layers, it errs by about 3% of
the product of their norms.
"""

from __future__ import annotations

from torch import Tensor

from sparse_compile.bank.adapter import Adapter
from sparse_compile.bank.errors import BankError
from sparse_compile.bank.signs import signs

__all__ = ["sketch_of"]

_WIDTH = 32
"""k. The 224 layers of an 8B model make a sketch of 0.9 MB."""


def sketch_of(adapter: Adapter) -> dict[str, Tensor]:
    """Return by layer the sketch (k, k) of an adapter, fp32.

    Raises:
        BankError: a factor holds NaN or infinity.
    """
    return {name: _sketch(adapter, name) for name in adapter.layers}


def _sketch(adapter: Adapter, name: str) -> Tensor:
    layer = adapter.layers[name]
    a, b = (factor.float() for factor in adapter.factors(name))
    if not (a.isfinite().all() and b.isfinite().all()):
        raise BankError(f"the adapter {adapter.folder} has NaN or infinity in {name}; train it again")
    left = signs(f"left {name}", _WIDTH, layer.outputs)
    right = signs(f"right {name}", layer.inputs, _WIDTH)
    return ((left @ b) @ (a @ right)) * (layer.scale / _WIDTH)
