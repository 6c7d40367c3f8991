"""Cut a block, or a layer, out of a captured graph, so that it can be run and timed alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from sparse_compile.graph.read import hinted_shape, nodes_by_name, tensor_value
from sparse_compile.graph.sites import Site
from sparse_compile.graph.walk import reach
from sparse_compile.passes.context import PassContext

__all__ = ["Block", "cut_block", "gets_gradient"]


@dataclass(frozen=True, eq=False)
class Block:
    """A block or a layer as a function of what it reads.

    Attributes:
        graph: Computes it from x and `weights`.
        weights: The model's own tensors, adapters included.
        signature: Equal for blocks that do the same operations on tensors of the same shapes.
    """

    graph: fx.GraphModule
    weights: tuple[Tensor, ...]
    signature: tuple[Any, ...]

    @property
    def trained(self) -> list[Tensor]:
        """Those of the weights that are trained."""
        return [each for each in self.weights if each.requires_grad]

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the block returns for x, of the shape it was captured with but for the number of tokens."""
        returned: Tensor = self.graph(x, *self.weights)
        return returned


def cut_block(gm: fx.GraphModule, source: str, end: str, ctx: PassContext) -> Block | None:
    """Return what computes one tensor of a graph from another.

    Args:
        gm: A canonical graph, before anything is rewritten.
        source: Name of the node that holds what it reads.
        end: Name of the node that holds what it returns.
        ctx: The context of the graph.

    Returns:
        The block; None where one of its weights is not at hand (a stand-in, or on the meta device), or where it reads a
        size that the graph was given.
    """
    nodes = nodes_by_name(gm.graph)
    x, y = nodes[source], nodes[end]
    needed = reach([y], lambda node: () if node is x else node.all_input_nodes)
    graph = fx.Graph()
    copies = {x: graph.placeholder("x")}
    weights: list[Tensor] = []
    signature: list[Any] = []
    for node in (each for each in gm.graph.nodes if each in needed and each is not x and each.op == "placeholder"):
        value = ctx.env.values.get(node.name)
        if value is None or value.is_meta:
            return None
        copies[node] = graph.placeholder(node.name)
        weights.append(value)
        signature.append((tuple(value.shape), value.dtype, value.device, value.requires_grad))
    for node in (each for each in gm.graph.nodes if each in needed and each is not x and each.op != "placeholder"):
        copies[node] = graph.node_copy(node, copies.__getitem__)
        signature.append((str(node.target), None if tensor_value(node) is None else hinted_shape(node)))
    graph.output(copies[y])
    return Block(fx.GraphModule(gm, graph), tuple(weights), tuple(signature))


def gets_gradient(gm: fx.GraphModule, site: Site, ctx: PassContext) -> bool:
    """Tell whether what a block reads gets a gradient in training: whether it depends on a trained weight.

    What comes from another graph, an activation, may get one.
    """
    before = reach([nodes_by_name(gm.graph)[site.source]], lambda node: node.all_input_nodes)
    for node in before:
        parameter = ctx.env.parameters.get(node.name)
        if parameter is not None and parameter.trained:
            return True
        value = tensor_value(node)
        given = node.op == "placeholder" and parameter is None
        if given and value is not None and value.is_floating_point() and value.dim() >= 3:
            return True
    return False
