"""What FX keeps in private."""

from __future__ import annotations

from typing import Any

from torch import fx, nn


def is_erased(node: fx.Node) -> bool:
    """Tell whether a node was erased from its graph."""
    return node._erased


def keep_used_names(source: fx.Graph, copy: fx.Graph) -> None:
    """Have a copy of a graph give no new node the name that an erased node of its source had."""
    copy._graph_namespace._used_names |= source._graph_namespace._used_names


def uncompiled_graph_module(root: nn.Module, graph: fx.Graph, class_name: str) -> fx.GraphModule:
    """Make a GraphModule whose Python code is generated when it is first run or read, as those of Dynamo are.

    The code of a graph that the next pass rewrites is never read, and generating it costs more than copying the graph.
    """
    from torch.fx._lazy_graph_module import _LazyGraphModule

    return _LazyGraphModule(root, graph, class_name=class_name)


def flattened(value: Any) -> tuple[list[Any], object]:
    """Return the leaves of nested tuples, lists and dicts, and the structure that holds them."""
    from torch.utils._pytree import tree_flatten

    return tree_flatten(value)
