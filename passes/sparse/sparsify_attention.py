"""Compute the projections of the attention blocks of the plan in the kept channels alone, for context tokens.

    %q = linear(%x, Wq, b)        %x_o, %x_c = take_rows(%x, ...)
                           ->     %q = put_rows(linear(%x_o, Wq, b), Wq[kept](%x_c) + b[kept], ..., kept)
    %y = linear(%a, Wo)           %a_o, %a_c = take_rows(%a, ..., kept_o)
                           ->     %y = put_rows(linear(%a_o, Wo), Wo[:, kept_o](%a_c), ...)

The base outputs of q, k and v are zero outside the kept channels; the base output projection reads its input with the
channels that are not kept zeroed. LoRA branches stay dense and untouched: only base products are replaced. A kept
channel d of key/value head j keeps channel d of the query heads that read head j. Where query, key and value are one
layer, its kept rows are theirs together: one product. A part beside them (a gate of the result) keeps all of its rows.
Of a DoRA adapter the frozen product of its own is replaced in the same way, and the bias that it takes off the base
output is off already where a channel is dropped.

Approximate by intent (SparseLoRA, arXiv 2506.16500, section 3); the gradients are the exact gradients of the sparse
function (the authors' code passes none through the base path).
"""

from __future__ import annotations

import torch
from torch import fx

from sparse_compile.graph.facts import SitePlan
from sparse_compile.graph.read import argument, tensor_of
from sparse_compile.graph.rewrite import Rewriter, take_over
from sparse_compile.graph.sites import AttentionSite, Projection
from sparse_compile.passes.context import PassContext
from sparse_compile.passes.protocol import Numerics, Pass, PassOutcome
from sparse_compile.passes.write.sparse_rows import SparseRows

_OPS = torch.ops.sparselora


class SparsifyAttention(Pass):
    """Rewrite the attention sites of the plan."""

    requires = ("predictors",)
    ensures = ("sparse",)
    numerics = Numerics.APPROXIMATE
    sparsifies = "attention"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassOutcome:
        """Rewrite the graph in place."""
        plans = [plan for plan in ctx.facts.plan.sparse_sites if isinstance(plan.site, AttentionSite)]
        if not plans:
            return PassOutcome(False)
        rewriter = Rewriter(gm, self.name)
        for plan in plans:
            _rewrite(plan, rewriter, ctx)
        return PassOutcome(True, {"sites": len(plans), "inserted": rewriter.inserted})


def _rewrite(plan: SitePlan, rewriter: Rewriter, ctx: PassContext) -> None:
    site = plan.site
    assert isinstance(site, AttentionSite)
    rows = SparseRows(rewriter, ctx)
    kept_qk, kept_vo = (rows.nodes[name] for name in ctx.facts.selections[site.identity])
    inputs = (site.query, site.key, site.value)
    first = next(node for node in rewriter.graph.nodes if node.name in {projection.base for projection in inputs})
    with rewriter.before(first, site.name):
        kept_q = rewriter.call(_OPS.expand_kv_channels.default, kept_qk, site.head_dim, site.groups)
        kept_o = rewriter.call(_OPS.expand_kv_channels.default, kept_vo, site.value_head_dim, site.groups)
        segments = rows.split(rows.nodes[site.source])
        parts: dict[Projection, list[tuple[Projection, fx.Node]]] = {}
        for projection, kept in zip(inputs, (kept_q, kept_qk, kept_vo), strict=True):
            parts.setdefault(projection.layer, []).append((projection, kept))
        for part in site.beside:
            channels = rewriter.call(torch.arange, part.out_features, device=tensor_of(kept_qk).device)
            parts[part.layer].append((part, channels))
        layers = [(layer, rows.layer_channels(pairs)) for layer, pairs in parts.items()]
    for layer, kept in layers:
        for name in layer.products:
            # A DoRA adapter with dropout multiplies an input of its own.
            shared = segments if name == layer.base else None
            _rewrite_input(rows.nodes[name], layer, kept, shared, rows, site.name)
        for term in layer.dora:
            if term.unbiased is not None:
                _drop_bias(rows.nodes[term.unbiased], layer, kept, rows, site.name)
    # Where only rows of the loss are left of the output projection, none of them is context: it stays dense.
    if site.output in plan.projections:
        for name in site.output.products:
            _rewrite_output(rows.nodes[name], site.output, kept_o, rows, site.name)


def _rewrite_input(
    product: fx.Node,
    projection: Projection,
    kept: fx.Node,
    segments: tuple[fx.Node, fx.Node] | None,
    rows: SparseRows,
    site: str,
) -> None:
    """Have a product with the weight of q, k or v compute the kept channels alone, for context tokens."""
    source = argument(product, "input")
    with rows.rewriter.before(product, site):
        output, context = segments or rows.split(source)
        dense = rows.dense(product, {source: output})
        sparse = rows.gathered(context, product, projection, kept)
        merged = rows.merge(dense, sparse, source, projection.out_features, kept)
    take_over(product, merged)


def _drop_bias(unbiased: fx.Node, projection: Projection, kept: fx.Node, rows: SparseRows, site: str) -> None:
    """Have DoRA take the bias off where the sparse base product has one: a dropped channel has lost it."""
    call, method = rows.rewriter.call, rows.rewriter.method
    with rows.rewriter.before(unbiased, site):
        source = rows.nodes[projection.source]
        roles = method("reshape", rows.roles, *rows.leading_sizes(source), 1)
        bias = argument(unbiased, "other")
        channels = call(torch.zeros_like, bias, dtype=torch.bool)
        channels = call(torch.index_fill, channels, 0, kept, True)
        bias = call(torch.where, call(torch.logical_or, roles, channels), bias, 0.0)
        less = call(torch.sub, argument(unbiased, "input"), bias)
    take_over(unbiased, less)


def _rewrite_output(product: fx.Node, projection: Projection, kept: fx.Node, rows: SparseRows, site: str) -> None:
    """Have a product with the weight of o read the kept channels alone, for context tokens."""
    source = argument(product, "input")
    with rows.rewriter.before(product, site):
        output, context = rows.split(source, kept)
        dense = rows.dense(product, {source: output})
        sparse = rows.gathered_input(context, product, projection, kept)
        merged = rows.merge(dense, sparse, source, projection.out_features)
    take_over(product, merged)
