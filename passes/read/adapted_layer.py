"""Find a frozen layer and its one adapter that can become a single product: nothing else lies between x and their sum.

    %base   = linear(%x, W, b)
    %low    = linear(%x, A)
    %up     = linear(%low, B)
    %scaled = mul(%up, s)
    %output = add(%base, %scaled)

Casts lie between them where the adapter has another dtype than the layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import fx

from sparse_compile.graph.declined import Declined
from sparse_compile.graph.read import argument, calls_torch, op_name, tensor_value
from sparse_compile.graph.sites import Projection
from sparse_compile.graph.vocabulary import CASTS, LINEAR, MULTIPLICATIONS
from sparse_compile.passes.read.mutation import mutation_between


@dataclass(frozen=True)
class AdaptedLayer:
    """A layer and its one adapter: the operands of the product that both can become.

    Attributes:
        x: input of the layer, (..., in).
        weight: W, (out, in).
        a: A, (r, in).
        b: B, (out, r).
        bias: (out,), or None.
        scale: s.
        products: the nodes that multiply with W, A and B.
        output: the sum.
        cast: whether the layer and its adapter compute in different dtypes.
    """

    x: fx.Node
    weight: fx.Node
    a: fx.Node
    b: fx.Node
    bias: fx.Node | None
    scale: float
    products: tuple[fx.Node, fx.Node, fx.Node]
    output: fx.Node
    cast: bool


def adapted_layer(projection: Projection, nodes: Mapping[str, fx.Node]) -> AdaptedLayer:
    """Return a layer with its adapter.

    Args:
        projection: a layer with at least one adapter.
        nodes: the nodes of the graph by name.

    Raises:
        Declined: the two cannot become one product.
    """
    if projection.dora:
        reason = "its adapter is weight-decomposed (DoRA), whose magnitudes scale whole rows of a merged weight"
        raise Declined(projection.name, reason)
    if len(projection.branches) > 1:
        raise Declined(projection.name, "it has several adapters")
    (branch,) = projection.branches
    if branch.dropout is not None:
        reason = "the adapter's input is dropped out: the layer's is not, so the two cannot be merged"
        raise Declined(projection.name, reason)
    names = (projection.base, branch.a, branch.b, branch.output, projection.output)
    base, low, up, scaled, output = (nodes[name] for name in names)
    if low.target is not LINEAR:
        raise Declined(projection.name, "the adapter is fused with others")
    if any(argument(product, "bias") is not None for product in (low, up)):
        raise Declined(projection.name, "the adapter has a bias")
    products = (base, low, up)
    operands = [argument(product, name) for product in products for name in ("input", "weight")]
    values = [tensor_value(node) for node in (*operands, *products)]
    if None in values:
        raise Declined(projection.name, "its sizes are not known")
    ways = ((scaled, up), (argument(up, "input"), low), (_other(output, scaled), base))
    chains = [_multiples(top, bottom) for top, bottom in ways]
    between = {node for chain in chains for node in chain.nodes}
    if any(len(node.users) != 1 for node in (base, low, up, *between)):
        raise Declined(projection.name, "a product in between is read elsewhere")
    if any(chain.scale is None for chain in chains) or chains[2].scale != 1.0:
        raise Declined(projection.name, "the scale is no number")
    x = argument(base, "input")
    if mutation_between(x, output) is not None:
        raise Declined(projection.name, "its input may be written to in between")
    marks = {(node.meta.get("ac_graph_id"), node.meta.get("recompute")) for node in (base, low, up, scaled, output)}
    if len(marks) > 1:
        raise Declined(projection.name, "the layer and its adapter stand in different checkpoints")
    dtypes = {value.dtype for value in values if value is not None}
    casts = any(op_name(node) in CASTS for node in between) or argument(low, "input") is not x
    return AdaptedLayer(
        x=x,
        weight=argument(base, "weight"),
        a=argument(low, "weight"),
        b=argument(up, "weight"),
        bias=argument(base, "bias"),
        scale=math.prod(chain.scale for chain in chains if chain.scale is not None),
        products=products,
        output=output,
        cast=casts or len(dtypes) > 1,
    )


class _Chain(NamedTuple):
    """Casts and products with numbers between two tensors.

    The scale is None where something else is between them.
    """

    scale: float | None
    nodes: tuple[fx.Node, ...]


def _multiples(top: fx.Node, bottom: fx.Node) -> _Chain:
    """Follow `top` back to `bottom`."""
    scale, node, nodes = 1.0, top, []
    while node is not bottom:
        nodes.append(node)
        operands = [arg for arg in node.args if isinstance(arg, fx.Node)]
        numbers = [arg for arg in node.args if isinstance(arg, int | float)]
        if op_name(node) in CASTS and calls_torch(node) and operands:
            node = operands[0]
        elif op_name(node) in MULTIPLICATIONS and len(operands) == len(numbers) == 1:
            node = operands[0]
            scale *= float(numbers[0])
        else:
            return _Chain(None, tuple(nodes))
    return _Chain(scale, tuple(nodes))


def _other(addition: fx.Node, operand: fx.Node) -> fx.Node:
    """Return what is added to `operand`."""
    (other,) = (arg for arg in addition.args if isinstance(arg, fx.Node) and arg is not operand)
    return other
