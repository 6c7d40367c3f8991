"""Tell which calls compute each element from the same element of their operands: an FFN's region is made of these."""

from __future__ import annotations

from torch import fx

from sparse_compile.graph.read import calls_torch, op_name, tensor_value
from sparse_compile.graph.vocabulary import ELEMENTWISE

_OF_TWO = {"min", "max"}


def is_elementwise(node: fx.Node) -> bool:
    """Tell whether `node` maps each element of its tensor operands on its own (dropout draws per element: it does)."""
    if not calls_torch(node) or tensor_value(node) is None:
        return False
    name = op_name(node)
    if name in _OF_TWO:
        # Of one tensor, `max` takes the largest of its elements.
        return len([arg for arg in node.args if tensor_value(arg) is not None]) == 2
    # `relu_`, `__mul__`, `imul`, `rsub` are spellings of the same functions.
    spellings = (name, name.rstrip("_"), name.strip("_"), name.strip("_")[1:])
    return any(spelling in ELEMENTWISE for spelling in spellings)


def tensor_operands(node: fx.Node) -> list[fx.Node]:
    """Return the operands of `node` that hold tensors, in order, each once."""
    return [operand for operand in node.all_input_nodes if tensor_value(operand) is not None]
