"""Which modes a captured graph has switched at a node: autocast, gradients."""

from __future__ import annotations

from itertools import takewhile

from torch import fx

from sparse_compile.graph.read import op_name
from sparse_compile.graph.vocabulary import MODE_SWITCHES


def switches_modes(graph: fx.Graph) -> bool:
    """Tell whether a graph changes how its calls are executed."""
    return any(op_name(node) in MODE_SWITCHES for node in graph.nodes)


def switches_in_force(anchor: fx.Node) -> list[fx.Node]:
    """Return the calls before a node whose modes are in force where it runs, outermost first."""
    entered: dict[fx.Node, None] = {}
    gradients: list[fx.Node] = []
    for node in takewhile(lambda node: node is not anchor, anchor.graph.nodes):
        name = op_name(node)
        if name in ("_enter_autocast", "_enter_inference_mode"):
            entered[node] = None
        elif name in ("_exit_autocast", "_exit_inference_mode"):
            entered.pop(node.args[0], None)
        elif name == "_set_grad_enabled":
            gradients = [node]
    return [*entered, *gradients]
