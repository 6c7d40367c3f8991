"""Know a LoRA branch in a canonical graph: two trained products, with casts, dropout and numbers between them."""

from __future__ import annotations

from torch import fx

from sparse_compile.graph.read import argument, calls_torch, op_name, strip_casts, tensor_value
from sparse_compile.graph.sites import LoRABranch
from sparse_compile.graph.vocabulary import LINEAR, MULTIPLICATIONS, SUMS
from sparse_compile.passes.context import PassContext


def is_sum(node: fx.Node) -> bool:
    """Tell whether `node` adds its two operands, neither of them scaled."""
    return op_name(node) in SUMS and bool(node.kwargs.get("alpha", 1) == 1)


def match_branch(output: fx.Node, source: fx.Node, ctx: PassContext) -> LoRABranch | None:
    """Return the LoRA branch that ends in `output` and belongs to the layer that reads `source`, or None."""
    b = strip_scale(output)
    if not is_adapter_product(b, ctx):
        return None
    a = strip_scale(argument(b, "input"))
    if not is_adapter_product(a, ctx):
        return None
    x, dropout = strip_casts(argument(a, "input")), None
    shared = strip_casts(source)
    # A dropout that the base product reads as well belongs to the block, not to the adapter.
    if x is not shared and calls_torch(x) and op_name(x) == "dropout":
        dropout, x = x.name, strip_casts(argument(x, "input"))
    if x is not shared:
        return None
    return LoRABranch(a=a.name, b=b.name, output=output.name, dropout=dropout)


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
    count where an option asks for another function, which holds in evaluation as well.
    """
    if node.target is not LINEAR:
        return False
    weight = strip_casts(argument(node, "weight"))
    if op_name(weight) == "t":
        weight = strip_casts(argument(weight, "input"))
    parameter = ctx.env.parameters.get(weight.name)
    return parameter is not None and (parameter.trained or bool(ctx.env.config.requested))
