"""Tell what the projections of a site have in common, and which nodes belong to a projection."""

from __future__ import annotations

from torch import fx

from sparse_compile.graph.read import strip_casts
from sparse_compile.graph.sites import Projection
from sparse_compile.graph.walk import reach


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

    The layer may read a cast of the tensor that its adapters read.
    """
    base, source = nodes[projection.base], nodes[projection.source]
    ends = {base, source, strip_casts(source)}
    starts = [*projection.products[1:], *(branch.a for branch in projection.adapters)]
    back = reach(
        (nodes[name] for name in starts),
        lambda node: [each for each in node.all_input_nodes if each.op != "placeholder" and each not in ends],
    )
    return {base, *back}
