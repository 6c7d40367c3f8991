"""Which calls write to a tensor in place, and where that matters."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator
from typing import Any

from torch import fx

from sparse_compile.graph.read import op_name
from sparse_compile.graph.vocabulary import IN_PLACE, LINEAR, MODE_SWITCHES
from sparse_compile.torch_private.aten import overload, overload_writes

_WORDS = frozenset({operator.and_, operator.or_, operator.not_, operator.is_})
"""Functions whose names end in an underscore because Python has the bare word; they write to nothing."""


def mutation_between(root: fx.Node, end: fx.Node) -> fx.Node | None:
    """Return the first call between two nodes that may write to the tensor `root`: it has two values there.

    What a call writes to is followed back to a product, through everything that may be a view. A product is a new
    tensor.
    """
    own = set(_storage_path(root))
    node = root.next
    while node is not end and node.op != "root":
        if writes_in_place(node):
            written = [value for value in (_first(node), node.kwargs.get("out")) if isinstance(value, fx.Node)]
            if not written or any(own & set(_storage_path(value)) for value in written):
                return node
        node = node.next
    return None


def written_in_place(graph: fx.Graph) -> set[fx.Node]:
    """Return every node whose tensor some call of the graph may write to: it holds more than one value."""
    written: set[fx.Node] = set()
    for node in graph.nodes:
        if writes_in_place(node):
            for value in (_first(node), node.kwargs.get("out")):
                written.update(_storage_path(value) if isinstance(value, fx.Node) else ())
    return written


def _first(node: fx.Node) -> Any:
    """Return the first operand of a call, which a call in place writes to."""
    return node.args[0] if node.args else node.kwargs.get("input")


def _storage_path(node: fx.Node) -> Iterator[fx.Node]:
    yield node
    while node.target is not LINEAR and isinstance(first := _first(node), fx.Node):
        node = first
        yield node


def overwritten(node: fx.Node) -> fx.Node | None:
    """Return the operand that a call writes to in place, where it has other readers: they may see either value."""
    first = _first(node)
    is_shared = isinstance(first, fx.Node) and len(first.users) > 1
    return first if is_shared and writes_in_place(node) else None


def writes_in_place(node: fx.Node) -> bool:
    """Tell whether a call may write to one of its operands."""
    name = op_name(node)
    if (op := overload(node.target)) is not None:
        return overload_writes(op)
    if node.op not in ("call_function", "call_method") or name in MODE_SWITCHES:
        return False
    if node.target in _WORDS:
        return False
    method = name.strip("_")
    in_place = (name.endswith("_") and not name.endswith("__")) or name in IN_PLACE
    return in_place or (name != method and method in IN_PLACE) or "out" in node.kwargs or _inplace_flag(node)


def _inplace_flag(node: fx.Node) -> bool:
    if "inplace" in node.kwargs or not callable(node.target):
        return bool(node.kwargs.get("inplace"))
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):  # a builtin without a signature
        return False
    return bool(bound.arguments.get("inplace"))
