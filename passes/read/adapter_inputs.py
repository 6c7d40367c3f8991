"""Find the adapters that read the same tensor: one product can serve them all."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from torch import fx

from sparse_compile.graph.read import argument, calls_torch, op_name, tensor_value
from sparse_compile.graph.sites import LoRABranch, Projection
from sparse_compile.graph.vocabulary import CASTS, LINEAR, MODE_SWITCHES
from sparse_compile.passes.context import PassContext


@dataclass(frozen=True)
class Adapter:
    """A LoRA branch as it stands in the graph.

    Attributes:
        projection: the layer it belongs to.
        branch: the branch.
        product: the product with its A.
        root: the tensor it reads, before casts.
        bias: whether its A has a bias.
    """

    projection: Projection
    branch: LoRABranch
    product: fx.Node
    root: fx.Node
    bias: bool


def adapters_by_input(graph: fx.Graph, ctx: PassContext) -> list[list[Adapter]]:
    """Return the adapters of the graph in groups: one product could serve the adapters of a group.

    The adapters of a group read one tensor through the same casts and compute in the same dtypes. They stand in one
    region of autocast and gradient mode, and in one activation checkpoint. Each dropout of a tensor is another tensor.
    Groups and adapters come in graph order.
    """
    branches = {
        branch.a: (projection, branch)
        for projection in ctx.facts.projections.values()
        for branch in projection.adapters
    }
    groups: dict[Hashable, list[Adapter]] = {}
    region = 0
    for node in graph.nodes:
        region += op_name(node) in MODE_SWITCHES
        # An adapter that an earlier pass fused or merged is no product with A any more.
        if node.name not in branches or node.target is not LINEAR:
            continue
        x, weight = argument(node, "input"), argument(node, "weight")
        values = tensor_value(x), tensor_value(weight), tensor_value(node)
        if None in values:
            continue
        root, casts = _without_casts(x)
        dtypes = tuple(value.dtype for value in values if value is not None)
        key = (root, casts, dtypes, region, node.meta.get("ac_graph_id"), node.meta.get("recompute"))
        adapter = Adapter(*branches[node.name], node, root, argument(node, "bias") is not None)
        groups.setdefault(key, []).append(adapter)
    return list(groups.values())


def _without_casts(node: fx.Node) -> tuple[fx.Node, tuple[object, ...]]:
    """Follow casts back to what they cast; return it, and the dtypes and devices on the way."""
    casts: list[object] = []
    while calls_torch(node) and op_name(node) in CASTS and isinstance(node.args[0], fx.Node):
        value = tensor_value(node)
        casts.append(node if value is None else (value.dtype, value.device))
        node = node.args[0]
    return node, tuple(casts)
