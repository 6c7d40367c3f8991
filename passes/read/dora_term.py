"""Know a DoRA term in a canonical graph (PEFT's `DoraLinearLayer`; DoRA, arXiv 2402.09353).

    %y       = linear(%x, W, b)                   the output so far
    %v       = (m / detach(norm)).view(1, -1)     a number a channel, of parameters alone
    %z       = sub(%y, b)                         without dropout (no node where there is no bias)
    %z       = linear(%xd, W)                     with dropout: %xd = dropout(%x), which the branch reads as well
    %branch  = mul(mul(%v, linear(linear(%x or %xd, A), B)), s)
    %term    = add(mul(sub(%v, 1), %z), %branch)
    %output  = add(%y, %term)

Nothing but the term and the addition may read the output so far. How v is computed plays no part.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from sparse_compile.graph.read import (
    argument,
    calls_torch,
    hinted_shape,
    op_name,
    stored_matrix,
    strip_casts,
    tensor_value,
)
from sparse_compile.graph.sites import DoRATerm
from sparse_compile.graph.vocabulary import CASTS, DIFFERENCES, LINEAR, MULTIPLICATIONS
from sparse_compile.graph.walk import reach, readers
from sparse_compile.passes.context import PassContext
from sparse_compile.passes.read.lora_branch import is_sum, match_branch


def dora_term(running: fx.Node, base: fx.Node, source: fx.Node, ctx: PassContext) -> tuple[fx.Node, DoRATerm] | None:
    """Return the addition that reads an output so far, and the DoRA term that it adds; None where there is none.

    Args:
        running: the output so far.
        base: the layer's product.
        source: its input.
        ctx: tells parameters.
    """
    found = set(readers(running, through=lambda user: op_name(user) in CASTS and calls_torch(user)))
    for addition in found:
        if not is_sum(addition):
            continue
        others = [arg for arg in addition.args if isinstance(arg, fx.Node) and strip_casts(arg) is not running]
        term = _term(strip_casts(others[0]), running, base, source, ctx) if len(others) == 1 else None
        if term is not None and found <= {addition, *term[1]}:
            return addition, term[0]
    return None


def _term(
    total: fx.Node, running: fx.Node, base: fx.Node, source: fx.Node, ctx: PassContext
) -> tuple[DoRATerm, set[fx.Node]] | None:
    """Match a term; return it and the nodes of it that read the output so far."""
    if not is_sum(total) or len(total.all_input_nodes) != 2:
        return None
    width = hinted_shape(base)[-1]
    for scaled, adapted in (total.all_input_nodes, total.all_input_nodes[::-1]):
        core, products = _without_channel_scale(scaled, width, ctx)
        inner, scaling = _without_channel_scale(adapted, width, ctx)
        branch = match_branch(inner, source, ctx) if products and scaling else None
        if branch is None:
            continue
        branch = replace(branch, output=adapted.name)
        if core is running:
            return DoRATerm(branch, None, None), set(products)
        if core.target is LINEAR and _is_product_of(core, base, branch.dropout or strip_casts(source).name):
            return DoRATerm(branch, core.name, None), set()
        if _is_unbiased(core, running, base):
            return DoRATerm(branch, None, core.name), {core}
    return None


def _without_channel_scale(node: fx.Node, width: int, ctx: PassContext) -> tuple[fx.Node, list[fx.Node]]:
    """Follow casts and products with numbers, one for all or one a channel, back to what they scale.

    Returns what is scaled, and the products; no products where no channel has a number of its own.
    """
    products: list[fx.Node] = []
    per_channel = False
    scaled = strip_casts(node)
    while calls_torch(scaled) and op_name(scaled) in MULTIPLICATIONS:
        tensors = [arg for arg in scaled.args if isinstance(arg, fx.Node) and tensor_value(arg) is not None]
        inner = [arg for arg in tensors if not _is_channel_vector(arg, width, ctx)]
        if len(inner) != 1:
            break
        per_channel = per_channel or len(tensors) > 1
        products.append(scaled)
        scaled = strip_casts(inner[0])
    return scaled, products if per_channel else []


def _is_channel_vector(node: fx.Node, width: int, ctx: PassContext) -> bool:
    """Tell whether a tensor holds one number for each of `width` channels, computed from stored weights alone."""
    shape = hinted_shape(node)
    if not shape or shape[-1] != width or not set(shape[:-1]) <= {1}:
        return False
    known = {
        *ctx.env.parameters,
        *(name for weight in ctx.facts.quantized_weights.values() for name in weight.operands),
    }
    computed_from = reach([node], lambda each: each.all_input_nodes)
    return all(each.name in known for each in computed_from if each.op == "placeholder")


def _is_product_of(node: fx.Node, base: fx.Node, read: str) -> bool:
    """Tell whether `node` is the layer's product with the tensor `read`, without its bias."""
    weights = [stored_matrix(argument(each, "weight")) for each in (node, base)]
    x = strip_casts(argument(node, "input"))
    return weights[0] == weights[1] and argument(node, "bias") is None and x.name == read


def _is_unbiased(node: fx.Node, running: fx.Node, base: fx.Node) -> bool:
    """Tell whether `node` takes the layer's bias off the output so far."""
    bias = argument(base, "bias")
    if op_name(node) not in DIFFERENCES or not calls_torch(node) or node.kwargs or len(node.args) != 2 or bias is None:
        return False
    minuend, subtrahend = (strip_casts(each) if isinstance(each, fx.Node) else each for each in node.args)
    return minuend is running and subtrahend is strip_casts(bias)
