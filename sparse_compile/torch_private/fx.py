"""What FX keeps in private."""

from __future__ import annotations

from typing import Any

from torch import fx


def is_erased(node: fx.Node) -> bool:
    """Tell whether a node was erased from its graph."""
    return node._erased


def keep_used_names(source: fx.Graph, copy: fx.Graph) -> None:
    """Have a copy of a graph give no new node the name that an erased node of its source had."""
    copy._graph_namespace._used_names |= source._graph_namespace._used_names


def flattened(value: Any) -> tuple[list[Any], object]:
    """Return the leaves of nested tuples, lists and dicts, and the structure that holds them."""
    from torch.utils._pytree import tree_flatten

    return tree_flatten(value)
