"""Tell what the projections of a site have in common, which nodes belong to one, and what a product multiplies with."""

from __future__ import annotations

from typing import Any

from torch import fx

from sparse_compile.graph.read import argument, op_name, strip_casts
from sparse_compile.graph.sites import Projection
from sparse_compile.graph.vocabulary import LINEAR, MATMULS
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


def matrix_operand(node: fx.Node) -> Any:
    """Return what a linear layer or a matrix product multiplies its input with; None for any other call."""
    if node.target is LINEAR:
        return argument(node, "weight")
    return argument(node, "other") if op_name(node) in MATMULS else None
