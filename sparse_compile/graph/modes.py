"""Which modes a captured graph has switched at a node: autocast, gradients."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from sparse_compile.graph.read import op_name
from sparse_compile.graph.vocabulary import MODE_SWITCHES


def switches_modes(graph: fx.Graph) -> bool:
    """Tell whether a graph changes how its calls are executed."""
    return any(op_name(node) in MODE_SWITCHES for node in graph.nodes)


def with_switches(graph: fx.Graph) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """Yield each node with the calls before it whose modes are in force where it runs, outermost first."""
    entered: dict[fx.Node, None] = {}
    gradients: list[fx.Node] = []
    for node in graph.nodes:
        yield node, [*entered, *gradients]
        name = op_name(node)
        if name in ("_enter_autocast", "_enter_inference_mode"):
            entered[node] = None
        elif name in ("_exit_autocast", "_exit_inference_mode"):
            entered.pop(node.args[0], None)
        elif name == "_set_grad_enabled":
            gradients = [node]


def switches_in_force(anchor: fx.Node) -> list[fx.Node]:
    """Return the calls before a node whose modes are in force where it runs, outermost first."""
    return next(switches for node, switches in with_switches(anchor.graph) if node is anchor)
