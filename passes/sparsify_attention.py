"""Compute the projections of the attention blocks of the plan in the kept channels alone, for context tokens.

    %q = linear(%x, Wq, b)        %x_o, %x_c = take_rows(%x, ...)
                           ->     %q = put_rows(linear(%x_o, Wq, b), Wq[kept](%x_c) + b[kept], ..., kept)
    %y = linear(%a, Wo)           %a_o, %a_c = take_rows(%a, ..., kept_o)
                           ->     %y = put_rows(linear(%a_o, Wo), Wo[:, kept_o](%a_c), ...)

The base outputs of q, k and v are zero outside the kept channels; the base output projection reads its input with the
channels that are not kept zeroed. LoRA branches stay dense and untouched: only base products are replaced. A kept
channel d of key/value head j keeps channel d of the query heads that read head j.

Approximate by intent (SparseLoRA, arXiv 2506.16500, section 3); the gradients are the exact gradients of the sparse
function (the authors' code passes none through the base path).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from sparse_compile.graph import Rewriter, take_over
from sparse_compile.ir import AttentionSite, Projection, SitePlan
from sparse_compile.passes.base import Numerics, PassContext, PassOutcome
from sparse_compile.passes.sparse_rows import SparseRows

_OPS = torch.ops.sparselora


@dataclass(frozen=True)
class SparsifyAttention:
    """Rewrite the attention sites of the plan."""

    name: str = "sparsify_attention"
    requires: tuple[str, ...] = ("predictors",)
    ensures: tuple[str, ...] = ("sparse",)
    numerics: Numerics = Numerics.APPROXIMATE
    analysis: bool = False
    optimises: bool = False

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassOutcome:
        """Rewrite the graph in place."""
        plans = [plan for plan in ctx.plan.sparse_sites if isinstance(plan.site, AttentionSite)]
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
    kept_qk, kept_vo = (rows.nodes[name] for name in ctx.selections[site.identity])
    inputs = (site.query, site.key, site.value)
    first = next(node for node in rewriter.graph.nodes if node.name in {projection.base for projection in inputs})
    with rewriter.before(first, site.name):
        kept_q = rewriter.call(_OPS.expand_kv_channels.default, kept_qk, site.head_dim, site.groups)
        kept_o = rewriter.call(_OPS.expand_kv_channels.default, kept_vo, site.value_head_dim, site.groups)
        output, context = rows.split(rows.nodes[site.source])
    for projection, kept in zip(inputs, (kept_q, kept_qk, kept_vo), strict=True):
        base = rows.nodes[projection.base]
        with rewriter.before(base, site.name):
            source = rows.nodes[site.source]
            dense = rows.dense(base, {source: output})
            merged = rows.merge(dense, rows.gathered(context, projection, kept), source, projection.out_features, kept)
        take_over(base, merged)
    # Where only rows of the loss are left of the output projection, none of them is context: it stays dense.
    if site.output in plan.projections:
        _rewrite_output(site.output, kept_o, rows, site.name)


def _rewrite_output(projection: Projection, kept: fx.Node, rows: SparseRows, site: str) -> None:
    base, source = rows.nodes[projection.base], rows.nodes[projection.source]
    with rows.rewriter.before(base, site):
        output, context = rows.split(source, kept)
        dense = rows.dense(base, {source: output})
        merged = rows.merge(dense, rows.gathered_input(context, projection, kept), source, projection.out_features)
    take_over(base, merged)
