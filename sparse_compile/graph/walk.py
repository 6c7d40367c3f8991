"""Walk a graph: every search of the passes along edges is one call here."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import fx

__all__ = ["reach", "readers"]


def reach(starts: Iterable[fx.Node], step: Callable[[fx.Node], Iterable[fx.Node]]) -> dict[fx.Node, None]:
    """Return the nodes that a walk meets, each once, in the order in which it meets them (depth first).

    Args:
        starts: where the walk begins; they are met as well.
        step: for a node, the nodes to go on to. Raise in it to end the walk.
    """
    met: dict[fx.Node, None] = {}
    frontier = list(starts)
    while frontier:
        node = frontier.pop()
        if node not in met:
            met[node] = None
            frontier += step(node)
    return met


def readers(node: fx.Node, through: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """Return what reads a node, directly or behind calls that only pass it on.

    Args:
        node: what is read.
        through: tells which calls pass on what they are given; these are no readers themselves.
    """
    met = reach(node.users, lambda user: user.users if through(user) else ())
    return [user for user in met if not through(user)]
