"""Know a LoRA branch in a canonical graph: two products, with casts, dropout and numbers between them.

Its factors are trained. An adapter that is loaded and active without being trained has frozen ones: then two layers are
an adapter where they pass through few channels and are added to a layer of the same input. Their product is a part of
that layer's weight.
"""

from __future__ import annotations

from torch import fx

from sparse_compile.graph.read import argument, calls_torch, hinted_shape, op_name, strip_casts, tensor_value
from sparse_compile.graph.sites import LoRABranch, Parameter
from sparse_compile.graph.vocabulary import LINEAR, MULTIPLICATIONS, SUMS
from sparse_compile.passes.context import PassContext


def is_sum(node: fx.Node) -> bool:
    """Tell whether `node` adds its two operands, neither of them scaled."""
    return op_name(node) in SUMS and bool(node.kwargs.get("alpha", 1) == 1)


def match_branch(output: fx.Node, source: fx.Node, ctx: PassContext) -> LoRABranch | None:
    """Return the LoRA branch that ends in `output` and belongs to the layer that reads `source`, or None."""
    b = strip_scale(output)
    a = strip_scale(argument(b, "input")) if b.target is LINEAR else b
    low, up = _factor(a, ctx), _factor(b, ctx)
    if a is b or low is None or up is None:
        return None
    if not ((low.trained and up.trained) or ctx.env.config.requested or _is_low_rank(a, b)):
        return None
    x, dropout = strip_casts(argument(a, "input")), None
    shared = strip_casts(source)
    # A dropout that the base product reads as well belongs to the block, not to the adapter.
    if x is not shared and calls_torch(x) and op_name(x) == "dropout":
        dropout, x = x.name, strip_casts(argument(x, "input"))
    if x is not shared:
        return None
    return LoRABranch(
        a=a.name,
        b=b.name,
        output=output.name,
        dropout=dropout,
        factors=(low.node, up.node),
        trained=low.trained or up.trained,
    )


def strip_scale(node: fx.Node) -> fx.Node:
    """Follow casts and products with a number back to what they scale."""
    while True:
        node = strip_casts(node)
        if not (calls_torch(node) and op_name(node) in MULTIPLICATIONS):
            return node
        tensors = [arg for arg in node.args if isinstance(arg, fx.Node) and tensor_value(arg) is not None]
        if len(tensors) != 1:
            return node
        node = tensors[0]


def is_adapter_product(node: fx.Node, ctx: PassContext) -> bool:
    """Tell whether `node` is a linear layer whose weight may be an adapter's factor.

    Factors are trained, the weights of layers are frozen. Adapters that were loaded for evaluation are frozen too; they
    count where an option asks for another function, which holds in evaluation as well, and where a branch was found.
    """
    parameter = _factor(node, ctx)
    if parameter is None or parameter.trained or ctx.env.config.requested:
        return parameter is not None
    return any(
        parameter.node in branch.factors
        for projection in ctx.facts.projections.values()
        for branch in projection.adapters
    )


def _factor(node: fx.Node, ctx: PassContext) -> Parameter | None:
    """Return the parameter that a linear layer multiplies with, or None."""
    if node.target is not LINEAR:
        return None
    weight = strip_casts(argument(node, "weight"))
    if op_name(weight) == "t":
        weight = strip_casts(argument(weight, "input"))
    return ctx.env.parameters.get(weight.name)


def _is_low_rank(a: fx.Node, b: fx.Node) -> bool:
    """Tell whether two products pass through fewer channels than they read and than they write.

    Only then are two frozen layers an adapter of the layer that they are added to.
    """
    operand = argument(a, "input")
    if tensor_value(operand) is None or tensor_value(a) is None or tensor_value(b) is None:
        return False
    width, rank, out = (hinted_shape(node)[-1] for node in (operand, a, b))
    return rank < min(width, out)
