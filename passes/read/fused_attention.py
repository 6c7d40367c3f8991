"""Read a call of PyTorch's fused attention."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from sparse_compile.graph.read import argument, hinted_shape

__all__ = ["operands_of", "scale_of"]


def operands_of(node: fx.Node) -> tuple[Any, Any, Any]:
    """Return query, key and value of a `scaled_dot_product_attention`."""
    return argument(node, "query"), argument(node, "key"), argument(node, "value")


def scale_of(node: fx.Node) -> Any:
    """Return what its scores are multiplied by: what is given, else one over the root of the width of a query."""
    scale = argument(node, "scale")
    return 1 / math.sqrt(hinted_shape(argument(node, "query"))[-1]) if scale is None else scale
