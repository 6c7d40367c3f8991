"""Spell a rewritten graph so that AOTAutogradCache takes it.

The cache refuses a graph that calls a method on a node without an example value: it cannot tell that the receiver is a
tensor. Dynamo's nodes have one, those that passes insert have none. Refused, a second process traces and partitions the
whole training step again, which is most of what compilation costs it. Functions are taken whatever they are called on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import fx

_SIZES_LAST: Final = frozenset({"expand", "permute", "repeat", "reshape", "view"})
"""Methods that take sizes or dimensions one by one, where the function takes them as one sequence."""

_CASTS: Final = {
    "bfloat16": torch.bfloat16, "bool": torch.bool, "double": torch.float64, "float": torch.float32,
    "half": torch.float16, "int": torch.int32, "long": torch.int64,
}  # fmt: skip


def spell_as_functions(gm: fx.GraphModule) -> int:
    """Turn method calls on tensors that passes inserted into calls of the functions that do the same, in place.

    A method without such a function is left: the graph is right as it is, and not cached.

    Returns:
        The number of calls that were turned.
    """
    count = 0
    for node in gm.graph.nodes:
        if node.op != "call_method" or "example_value" in node.args[0].meta:
            continue
        call = _as_function(node.target, node.args)
        if call is not None:
            node.op, (node.target, node.args) = "call_function", call
            count += 1
    if count:
        gm.recompile()
    return count


def _as_function(method: str, args: tuple[Any, ...]) -> tuple[Callable[..., Any], tuple[Any, ...]] | None:
    """Return a function and its positional arguments."""
    receiver, *rest = args
    if method in _CASTS:
        return torch.ops.aten.to, (receiver, _CASTS[method], *rest)
    if method == "size":
        return (torch.ops.aten.sym_size, args) if rest else None
    if method in _SIZES_LAST and rest and all(isinstance(size, int | fx.Node) for size in rest):
        args = (receiver, rest)
    function = getattr(torch, method, None)
    if type(function) is not type(torch.add):
        # Not every method is in torch's namespace, and some of those names are dtypes.
        function = getattr(torch.ops.aten, method, None)
    return None if function is None else (function, args)
