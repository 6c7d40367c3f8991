"""What the projections of a site have in common."""

from __future__ import annotations

from torch import fx

from sparse_compile.graph.read import strip_casts
from sparse_compile.graph.sites import Projection


def site_name(projections: tuple[Projection, ...]) -> str:
    """Return the module path that the projections share, or the first one's own path where they share none."""
    paths = [projection.name.split(".") for projection in projections]
    # A module that is its own projection (one linear alone) is named by its parent, so leave the last part out.
    common = list(paths[0][:-1])
    for path in paths[1:]:
        agreeing = [a == b for a, b in zip(common, path[:-1], strict=False)]
        common = common[: agreeing.index(False) if False in agreeing else len(agreeing)]
    return ".".join(common) or projections[0].name


def read_by(projection: Projection, nodes: dict[str, fx.Node]) -> set[fx.Node]:
    """Return the nodes of a projection that read its input: its products, casts, dropouts and the adapters.

    Adapters may read what the layer itself reads a cast of.
    """
    own = {nodes[projection.base]}
    roots = {projection.source, strip_casts(nodes[projection.source]).name}
    frontier = [nodes[name] for name in projection.products[1:]]
    frontier += [nodes[branch.a] for branch in projection.adapters]
    while frontier:
        node = frontier.pop()
        own.add(node)
        frontier += [operand for operand in node.all_input_nodes if operand.op != "placeholder"]
        frontier = [operand for operand in frontier if operand.name not in roots and operand not in own]
    return own
