"""Compute a frozen layer and its adapters in one generated kernel, one pass over the tiles of the output.

    %base   = linear(%x, W, b)
    %low    = linear(%x, A)                   %low    = linear(%x, A)
    %up     = linear(%low, B)          ->     %y      = fused_linear([%x], [W], [], [0], [-1], [%low], [B], [b],
    %scaled = mul(%up, s)                                            'p0 + s*t0 + v0', ...)[0]
    %output = add(%base, %scaled)

For layers of all tokens, and for the half of a sparse feed-forward block that computes output tokens. What A multiplies
is not looked at: it may be dropped out, of another layer, or a part of a stacked product.

Legal because: the products are computed as before, and summed in fp32; only roundings between them go.

Declines when: the kernels are not asked for (`kernels="triton"`) or do not run on the device, the weight is in 4 bits,
layer and adapter compute in different dtypes or stand in different checkpoints, a product in between is read elsewhere,
what they read may be written to in between. What another pass merged, masked or gathered is no such sum any more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from sparse_compile.graph.declined import Declined
from sparse_compile.graph.facts import Rejection
from sparse_compile.graph.read import argument, calls_torch, op_name, stored_matrix, tensor_of
from sparse_compile.graph.rewrite import Rewriter, take_over
from sparse_compile.graph.sites import Projection
from sparse_compile.graph.vocabulary import CASTS, LINEAR
from sparse_compile.kernels.fused_linear import FUSED_LINEAR
from sparse_compile.kernels.providers import REFERENCE, OpCall
from sparse_compile.passes.context import PassContext, declined_providers
from sparse_compile.passes.protocol import Pass, PassOutcome
from sparse_compile.passes.read.autocast import autocast_dtypes
from sparse_compile.passes.read.lora_branch import is_adapter_product, is_sum, strip_scale
from sparse_compile.passes.read.mutation import mutation_between
from sparse_compile.passes.write.product_region import ProductRegion


class FuseAdaptedLayers(Pass):
    """Rewrite the sums of a frozen layer and its adapters."""

    requires = ("plan",)
    # Those take sums away; this pass takes what they leave.
    after = ("order_adapter_products", "fuse_adapters", "fuse_products")
    optimises = True

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassOutcome:
        """Rewrite the graph in place."""
        if ctx.env.config.kernels != "triton":
            return PassOutcome(False)
        rewriter = Rewriter(gm, self.name)
        layers = {projection.weight: projection for projection in ctx.facts.projections.values()}
        rejections: dict[Rejection, None] = {}
        fused = 0
        products = [(node, _layer(node, layers)) for node in gm.graph.nodes]
        for base, projection in products:
            if projection is None or (end := _end(base, ctx)) is None:
                continue
            dtype, device = ctx.weight_kind(projection)
            choice = FUSED_LINEAR.choose(OpCall(device, dtype), ctx.env.config.kernels)
            if choice.provider == REFERENCE:
                rejections |= declined_providers(self.name, "fused_linear", choice)
                continue
            cast = None if dtype == torch.float64 else autocast_dtypes(gm.graph, ctx.env.autocast, device)[base.name]
            try:
                found = _region(base, end, cast, ctx)
            except Declined as declined:
                rejections[declined.by(self.name, at=projection.name)] = None
                continue
            x = argument(base, "input")
            with rewriter.before(end, projection.name):
                y = found.insert(rewriter, tensor_of(end).dtype, choice.provider, cast)
                take_over(end, _shaped(rewriter, y, end, x, projection.out_features))
            ctx.add_sources(found.sources(f"{projection.name}.adapted"))
            fused += 1
        return PassOutcome(fused > 0, {"fused": fused, "inserted": rewriter.inserted}, tuple(rejections))


def _layer(node: fx.Node, layers: dict[str, Projection]) -> Projection | None:
    """Return the frozen layer whose whole weight a node multiplies with."""
    if node.target is not LINEAR:
        return None
    weight = argument(node, "weight")
    return layers.get(weight.name) or layers.get(stored_matrix(weight)[0].name)


def _end(base: fx.Node, ctx: PassContext) -> fx.Node | None:
    """Return the last sum of a product and adapters, each of them added to it alone."""
    end, node = None, base
    while len(node.users) == 1:
        (user,) = node.users
        others = [operand for operand in user.all_input_nodes if operand is not node]
        if is_sum(user) and len(others) == 1 and is_adapter_product(strip_scale(others[0]), ctx):
            end = node = user
        elif calls_torch(user) and op_name(user) in CASTS:
            node = user
        else:
            break
    return end


def _region(base: fx.Node, end: fx.Node, cast: torch.dtype | None, ctx: PassContext) -> ProductRegion:
    """Return what is to be one kernel.

    Raises:
        Declined: a layer and its adapters cannot be.
    """
    if argument(base, "weight").name in ctx.facts.quantized_weights:
        raise Declined(base, "its weight is stored in 4 bits: used whole, it is dequantised once, before the product")
    found = ProductRegion(end, frozenset({base}))
    # Autocast has all of them compute in one dtype; without it, each computes in that of its weight.
    dtypes = {tensor_of(weight).dtype for weight in (argument(base, "weight"), *(thin.factor for thin in found.thins))}
    if cast is None and len(dtypes) > 1:
        raise Declined(end, "the layer and its adapter compute in different dtypes")
    if len({(node.meta.get("ac_graph_id"), node.meta.get("recompute")) for node in found.nodes}) > 1:
        raise Declined(end, "the layer and its adapter stand in different checkpoints")
    read: Sequence[fx.Node] = [argument(base, "input"), *(thin.thin for thin in found.thins)]
    if any(mutation_between(node, end) is not None for node in read):
        raise Declined(end, "its input may be written to in between")
    return found


def _shaped(rewriter: Rewriter, y: fx.Node, like: fx.Node, x: fx.Node, width: int) -> fx.Node:
    """Give a result (tokens, width) the leading sizes of what it replaces, and its rows no padding."""
    if width % 16:
        y = rewriter.method("contiguous", y)
    value = tensor_of(like)
    if value.ndim == 2:
        return y
    leading = [
        size if isinstance(size, int) else rewriter.method("size", x, dim) for dim, size in enumerate(value.shape[:-1])
    ]
    return rewriter.method("reshape", y, *leading, width)
