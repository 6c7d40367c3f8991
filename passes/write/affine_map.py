"""Insert the map of a recipe, and what hands on the rows that it is fitted to."""

from __future__ import annotations

import torch
from torch import fx

from sparse_compile.graph.facts import SitePlan
from sparse_compile.graph.rewrite import buffer_name
from sparse_compile.passes.context import PassContext
from sparse_compile.passes.write.sparse_rows import SparseRows

_OPS = torch.ops.sparselora


def insert_map(plan: SitePlan, rows: SparseRows, x: fx.Node, ctx: PassContext) -> fx.Node:
    """Insert `U (Q x) + b` with the map of a site, for x (tokens, in); return the node that holds (tokens, out)."""
    rewriter, surrogate = rows.rewriter, ctx.facts.surrogates[plan.site.identity]
    q, u, bias = (
        rewriter.buffer(buffer_name(plan.site.name, part), getattr(surrogate, part)) for part in ("q", "u", "bias")
    )
    if ctx.env.config.surrogate_gradient == "detached":
        x = rewriter.method("detach", x)
    if surrogate.rank == 0:
        return rewriter.method("expand", bias, rewriter.method("size", x, 0), -1)
    thin = rows.product(x, q, None, surrogate.q.shape[1])
    return rows.product(thin, u, bias, surrogate.rank)


def observe_rows(plan: SitePlan, rows: SparseRows, x: fx.Node, y: fx.Node, ctx: PassContext) -> None:
    """Have what a map is to read and to return of densely computed tokens handed on, for its fit.

    Args:
        plan: of the site whose map it is.
        rows: what inserts nodes.
        x: (tokens, in), of the output rows.
        y: (tokens, out), of the same.
        ctx: holds the map.
    """
    assert ctx.facts.scored is not None
    rewriter = rows.rewriter
    scored = rewriter.method("reshape", rows.nodes[ctx.facts.scored], -1)
    device = ctx.facts.surrogates[plan.site.identity].q.device
    seen = rewriter.buffer(buffer_name(plan.site.name, "seen"), torch.zeros((), dtype=torch.int64, device=device))
    x, y = (rewriter.method("detach", each) for each in (x, y))
    rewriter.call(_OPS.observe_rows.default, x, y, rows.rows[0], scored, seen, ctx.observed_as(plan.site))
