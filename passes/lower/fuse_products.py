"""Compute the products of a sparse feed-forward block and what lies between them in generated kernels.

    %p = gathered_linear(%x, %gate, %kept)                 %f = fused_linear([%x], [%gate, %up], [%kept, %kept],
    %t = linear(%xa, %b)                                            [%xa], [%b], 'p0*p1*sigmoid(p0 + 2.0*t0) + ...')
    %g = silu(%p + 2.0 * %t)                         ->    %h = %f[0]
    %h = %g * gathered_linear(%x, %up, %kept)
    %y = gathered_input_linear(%h, %down, %kept)     ->    %y = fused_linear([%h], [%down], ..., 'p0 + 2.0*t0')[0]
         + 2.0 * linear(%ha, %b)

    %w = dequantize_4bit(%packed, .., %kept, 0)      ->    %y = fused_linear([%x], [%packed], [%kept], .., 'p0', ..,
    %y = linear(%x, %w)                                             [%absmax], 'nf4 64 14336x4096')[0]

The elementwise region is lifted from the graph into a formula (`kernels/codegen`), from what is multiplied with the
out-projection, and from the block's result, back to products. A part of a fused gate and up layer becomes a product of
its own rows. A weight in 4 bits is dequantised inside the op, in the kernel where rows of it are chosen; products with
such weights that are left, in attention as well, become ops of one product.

Legal because: the formula is the region, and each product is computed as before; only roundings between them go.

Declines when: the kernels are not asked for (`kernels="triton"`) or do not run on the device; a call has no formula; an
intermediate is read outside the region; a weight in 4 bits has a format that the kernels do not read.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from sparse_compile.graph.declined import Declined
from sparse_compile.graph.facts import Rejection, SitePlan
from sparse_compile.graph.read import argument, op_name, tensor_of
from sparse_compile.graph.rewrite import Rewriter, take_over
from sparse_compile.graph.sites import FFNSite
from sparse_compile.graph.vocabulary import CASTS, LINEAR, TAG
from sparse_compile.kernels.fused_linear import FUSED_LINEAR
from sparse_compile.kernels.providers import REFERENCE
from sparse_compile.passes.context import PassContext, declined_providers
from sparse_compile.passes.protocol import Pass, PassOutcome
from sparse_compile.passes.write.product_region import ProductRegion, chosen_of_4bit

_OPS = torch.ops.sparselora


class FuseProducts(Pass):
    """Rewrite the context part of the sparse feed-forward sites."""

    requires = ("sparse",)

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassOutcome:
        """Rewrite the graph in place."""
        rewriter = Rewriter(gm, self.name)
        rejections: dict[Rejection, None] = {}
        fused = 0
        for plan in ctx.facts.plan.predicted_sites:
            if not (isinstance(plan.site, FFNSite) or any(_products_in_4bit(plan, gm.graph))):
                continue
            choice = FUSED_LINEAR.choose(ctx.op_call(plan), ctx.env.config.kernels)
            if choice.provider == REFERENCE:
                # Not fused, it is computed by the providers of single products: the op's own reference is none of them.
                rejections |= declined_providers(self.name, "fused_linear", choice)
                continue
            for part, end, dtype in _ends(plan, gm.graph, ctx):
                try:
                    found = ProductRegion(end)
                except Declined as declined:
                    rejections[declined.by(self.name, at=plan.site.name)] = None
                    continue
                if found.worthwhile:
                    with rewriter.before(end, plan.site.name):
                        take_over(end, found.insert(rewriter, dtype))
                    ctx.add_sources(found.sources(f"{plan.site.name}.{part}"))
                    fused += 1
        stats = {"fused": fused, "inserted": rewriter.inserted}
        return PassOutcome(fused > 0, stats, tuple(rejections))


def _ends(plan: SitePlan, graph: fx.Graph, ctx: PassContext) -> Iterator[tuple[str, fx.Node, torch.dtype]]:
    """Yield what ends a region for context tokens: its name, node and dtype.

    The intermediate and the result of a feed-forward block, then each product with a weight in 4 bits that is left.
    """
    if isinstance(plan.site, FFNSite):
        yield from _ends_of_ffn(plan, graph)
    for product in list(_products_in_4bit(plan, graph)):
        dense = argument(product, "weight")
        path = ctx.env.parameters[dense.args[0].name].path.removesuffix(".weight")
        yield path.removeprefix(f"{plan.site.name}."), product, argument(dense, "dtype")


def _ends_of_ffn(plan: SitePlan, graph: fx.Graph) -> Iterator[tuple[str, fx.Node, torch.dtype]]:
    inside = _inside(plan, graph)
    result = tensor_of(next(node for node in graph.nodes if node.name == plan.site.output.output)).dtype
    products = [node for node in inside if _gathers_inputs(node)]
    if len(products) == 1:
        hidden = argument(products[0], "input" if products[0].target is LINEAR else "h")
        while op_name(hidden) in CASTS and tensor_of(hidden).dtype == tensor_of(hidden.args[0]).dtype:
            hidden = hidden.args[0]  # autocast's, which does nothing behind the region's last call
        yield "intermediate", hidden, tensor_of(hidden).dtype
    for node in inside:
        if node.target is _OPS.put_rows.default:
            context = argument(node, "context")
            assert isinstance(context, fx.Node)
            yield "result", context, result


def _products_in_4bit(plan: SitePlan, graph: fx.Graph) -> Iterator[fx.Node]:
    return (node for node in _inside(plan, graph) if chosen_of_4bit(node) is not None)


def _inside(plan: SitePlan, graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.meta.get(TAG, {}).get("site") == plan.site.name]


def _gathers_inputs(node: fx.Node) -> bool:
    chosen = chosen_of_4bit(node)
    if chosen is None:
        return node.target is _OPS.gathered_input_linear.default
    return bool(argument(chosen, "dim") == 1)
