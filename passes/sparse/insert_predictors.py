"""Insert, for every site of the plan, the nodes that choose its channels for this batch.

At the top of the graph, once:

    %roles   = sparselora.output_mask(%labels, ignore_index, shift)      (B, S), or given_output_mask(%tokens)
    %roles   = %roles | %dense_step                                      all true where the schedule says dense
    %counts  = sparselora.row_counts(%roles, %targets, -100)             if `loss_rows` is there; the split reads it too
    %rows    = sparselora.split_tokens(%roles)                           output rows, context rows; or, of fixed sizes,
               sparselora.token_slots(%roles, C, N - C + bucket)         with spare slots, which no score reads
    %weights = ~%roles & %attention_mask                                 the tokens that take part in scores

Before an FFN site (x: its input, act and *: its own elementwise region):

    %picked, %valid = sparselora.spaced_rows(%weights, 16)               16 context tokens of each sequence
    %few = detach(%x)[%picked]                                           (16 B, in)
    %gate, %up = sparselora.low_rank_product(%few, A, B) (+ bias)        W' ~ A B, rank 8
    %score = || act(%gate) * %up ||                                      a number for each channel
    %kept = sparselora.top_channels(%score, k)

Before an attention site: the norms of q, k and v over context tokens; score of a key/value channel for V and O: ||v||;
for Q and K: ||k|| times the mean of ||q|| over the query heads that read it.

Approximate by intent (SparseLoRA, arXiv 2506.16500, sections 3.1 and 3.2). Nothing inserted here is differentiated;
roles and choices are marked MUST_SAVE, so that no recomputation ever reads others or makes another one.
"""

from __future__ import annotations

import math
import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from sparse_compile.graph.facts import SitePlan
from sparse_compile.graph.read import argument, hinted_shape, nodes_by_name, op_name, tensor_of
from sparse_compile.graph.rewrite import Rewriter, buffer_name, save_what_precedes
from sparse_compile.graph.sites import AttentionSite, FFNSite, Projection
from sparse_compile.options.presets import kept_count
from sparse_compile.passes.context import PassContext
from sparse_compile.passes.protocol import Numerics, Pass, PassOutcome
from sparse_compile.passes.write.output_mask import insert_output_mask

_OPS = torch.ops.sparselora
_DENSE_STEP = "sparselora_dense_step"


class InsertPredictors(Pass):
    """Insert token roles and channel predictors for the sites of the plan."""

    requires = ("plan",)
    ensures = ("predictors",)
    # What is narrowed to the rows of the loss needs no sparsity any more.
    after = ("plan_token_slots", "select_loss_rows")
    numerics = Numerics.APPROXIMATE

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassOutcome:
        """Rewrite the graph in place."""
        if not ctx.facts.plan.split_sites:
            return PassOutcome(False)
        rewriter = Rewriter(gm, self.name)
        builder = _PredictorBuilder(rewriter, ctx, *_insert_roles(rewriter, ctx))
        selections = {plan.site.identity: builder.build(plan) for plan in ctx.facts.plan.predicted_sites}
        ctx.facts = replace(ctx.facts, selections=selections)
        return PassOutcome(True, {"predictors": len(selections), "inserted": rewriter.inserted})


def _insert_roles(rewriter: Rewriter, ctx: PassContext) -> tuple[fx.Node, fx.Node | None]:
    """Insert the roles before the first node that is no input of the graph.

    Returns:
        The tokens that scores read; whether this is a dense step, None where none is.
    """
    source = nodes_by_name(rewriter.graph)[ctx.facts.plan.split_sites[0].site.source]
    tokens = tensor_of(source)
    top = next(node for node in rewriter.graph.nodes if node.op != "placeholder")
    # What is there already of the top of the graph is on the rows of the loss: their number is read with that of roles.
    (loss_rows,) = rewriter.graph.find_nodes(op="call_function", target=_OPS.loss_rows.default) or (None,)
    top = loss_rows or top
    with rewriter.before(top):
        mask, attended = insert_output_mask(rewriter, ctx, source)
        scored = None
        if any(plan.online for plan in ctx.facts.plan.mapped_sites):
            # By what tokens are, not by what this step makes of them: in a dense step all of them are computed densely.
            scored = _context(rewriter, mask, attended)
        if ctx.env.config.token_selection == "all_sparse":
            mask = rewriter.call(torch.zeros_like, mask)
        elif ctx.env.config.token_selection == "random_dense":
            eligible = attended if attended is not None else rewriter.call(torch.ones_like, mask)
            mask = rewriter.call(_OPS.shuffled_mask.default, mask, eligible)
        dense_step = None
        if ctx.env.dense_step is not None:
            dense_step = rewriter.buffer(_DENSE_STEP, ctx.env.dense_step(tokens.device))
            mask = rewriter.call(torch.logical_or, mask, dense_step)
        counts: tuple[fx.Node, ...] = ()
        if loss_rows is not None:
            counts = (rewriter.call(_OPS.row_counts.default, mask, *loss_rows.args),)
            loss_rows.args = (*loss_rows.args, *counts)
        rows = rewriter.items(_split(rewriter, mask, math.prod(tokens.shape[:-1]), ctx, counts), 2)
        weights = _context(rewriter, mask, attended)
    # The first node may be a checkpoint's, whose marks these have taken over.
    save_what_precedes(top)
    ctx.facts = replace(ctx.facts, rows=(rows[0].name, rows[1].name), scored=scored.name if scored else None)
    return weights, dense_step


def _context(rewriter: Rewriter, mask: fx.Node, attended: fx.Node | None) -> fx.Node:
    """Insert what is true at context tokens that are no padding."""
    context = rewriter.call(torch.logical_not, mask)
    return context if attended is None else rewriter.call(torch.logical_and, context, attended)


def _split(
    rewriter: Rewriter, mask: fx.Node, count: int | torch.SymInt, ctx: PassContext, counts: tuple[fx.Node, ...]
) -> fx.Node:
    """Insert the split of the tokens by role: of sizes that depend on data, or of fixed ones.

    Args:
        rewriter: where to insert.
        mask: the output tokens.
        count: the number of tokens.
        ctx: the slots.
        counts: the numbers of rows, where they are read anyway.
    """
    slots = ctx.facts.slots
    if slots is None:
        return rewriter.call(_OPS.split_tokens.default, mask, *counts)
    tokens = rewriter.method("numel", mask)
    outputs: fx.Node | int = slots.among(count)
    contexts: fx.Node | int = tokens
    if ctx.env.all_output:
        outputs, contexts = tokens, 0
    elif ctx.env.config.token_selection == "all_sparse":
        outputs = 0
    elif slots.bucket is not None:
        contexts = rewriter.call(operator.add, tokens, slots.bucket - slots.capacity)
    return rewriter.call(_OPS.token_slots.default, mask, outputs, contexts, slots.option)


class _PredictorBuilder:
    def __init__(self, rewriter: Rewriter, ctx: PassContext, weights: fx.Node, dense_step: fx.Node | None) -> None:
        self.rewriter = rewriter
        self.ctx = ctx
        self.nodes = nodes_by_name(rewriter.graph)
        # (B, S) bool: the tokens that take part in scores.
        self.weights = weights
        self.dense_step = () if dense_step is None else (dense_step,)
        # The rows picked of a batch serve every site: they depend on the roles alone.
        self.picked: tuple[fx.Node, ...] = ()

    def build(self, plan: SitePlan) -> tuple[str, ...]:
        """Insert the predictor of one site; return the names of the nodes that hold its channels."""
        site = plan.site
        bases = {projection.base for projection in site.projections}
        anchor = next(node for node in self.rewriter.graph.nodes if node.name in bases)
        vectors = {self.nodes[name] for name in (site.vectors if isinstance(site, FFNSite) else ())}
        for node in [node for node in self.rewriter.graph.nodes if node in vectors]:
            # A number that is computed between the projections is known behind it only.
            anchor = node.next if anchor < node else anchor
        with self.rewriter.before(anchor, site.name):
            if isinstance(site, FFNSite):
                return (self._ffn(site, plan.kept).name,)
            return tuple(node.name for node in self._attention(site, plan))

    def _ffn(self, site: FFNSite, kept: int) -> fx.Node:
        call = self.rewriter.call
        if self.ctx.env.config.channel_selection == "random":
            return self._top(self._random(site.channels, site.source), kept, site.name, site.source)
        rows, valid = self._scored_rows(self._flat(site.source), self.ctx.env.config.predictor_tokens)
        values = {self.nodes[projection.output]: self._predicted(rows, projection) for projection in site.inputs}
        for name in site.vectors:
            vector = self.rewriter.method("detach", self.nodes[name])
            # A vector of leading dimensions of size 1 would give the rows dimensions that they do not have.
            ranked = len(hinted_shape(self.nodes[name])) > 2
            values[self.nodes[name]] = self.rewriter.method("reshape", vector, -1) if ranked else vector
        hidden = None
        for name in site.region:
            node = self.nodes[name]
            if op_name(node) == "dropout":
                values[node] = values[argument(node, "input")]
            else:
                values[node] = self.rewriter.copy(node, lambda operand: values.get(operand, operand))
            hidden = values[node]
        assert hidden is not None
        hidden = call(torch.where, self.rewriter.method("unsqueeze", valid, 1), hidden, 0.0)
        return self._top(call(torch.linalg.vector_norm, hidden, dim=0), kept, site.name, site.source)

    def _attention(self, site: AttentionSite, plan: SitePlan) -> tuple[fx.Node, fx.Node]:
        kept_vo = kept_count(site.value.out_features, plan.sparsity)
        if self.ctx.env.config.channel_selection == "random":
            qk, vo = (self._random(p.out_features, site.source) for p in (site.key, site.value))
        else:
            rows, valid = self._flat(site.source), self.rewriter.method("reshape", self.weights, -1)
            query, key, vo = (self._norms(rows, valid, p) for p in (site.query, site.key, site.value))
            # (kv heads, groups, channels): the mean over the query heads that read a key/value head.
            query = self.rewriter.method("reshape", query, site.kv_heads, site.groups, site.head_dim)
            query = self.rewriter.method("reshape", self.rewriter.method("mean", query, 1), -1)
            qk = self.rewriter.call(torch.mul, query, key)
        return (
            self._top(qk, plan.kept, f"{site.name}:qk", site.source),
            self._top(vo, kept_vo, f"{site.name}:vo", site.source),
        )

    def _flat(self, source: str) -> fx.Node:
        node = self.nodes[source]
        return self.rewriter.method("reshape", self.rewriter.method("detach", node), -1, hinted_shape(node)[-1])

    def _scored_rows(self, x: fx.Node, tokens: Any) -> tuple[fx.Node, fx.Node]:
        """Return the rows that the score reads, (m, in), and which of them count, (m,) bool."""
        if tokens == "mean":
            has_context = self.rewriter.method("any", self.weights, 1)
            return self.rewriter.call(_OPS.context_mean.default, x, self.weights), has_context
        if tokens == "all":
            return x, self.rewriter.method("reshape", self.weights, -1)
        if not self.picked:
            with self.rewriter.before(self.weights.next):
                picked = self.rewriter.call(_OPS.spaced_rows.default, self.weights, tokens)
                self.picked = self.rewriter.items(picked, 2)
        rows, valid = self.picked
        return self.rewriter.call(torch.index_select, x, 0, rows), valid

    def _factors(self, projection: Projection) -> tuple[fx.Node, fx.Node]:
        factors = self.ctx.facts.factors[projection.name]
        pairs = (("a", factors.a), ("b", factors.b))
        a, b = (self.rewriter.buffer(buffer_name(projection.name, part), value) for part, value in pairs)
        return a, b

    def _bias(self, projection: Projection) -> fx.Node | None:
        if projection.bias is None:
            return None
        bias = self.rewriter.method("detach", self.nodes[projection.bias])
        if projection.fused is None:
            return bias
        rows = projection.fused
        blocks = self.rewriter.method("reshape", bias, rows.blocks, rows.stride)
        return self.rewriter.method("reshape", self.rewriter.method("narrow", blocks, 1, rows.offset, rows.width), -1)

    def _predicted(self, rows: fx.Node, projection: Projection) -> fx.Node:
        predicted = self.rewriter.call(_OPS.low_rank_product.default, rows, *self._factors(projection))
        bias = self._bias(projection)
        return predicted if bias is None else self.rewriter.call(torch.add, predicted, bias)

    def _norms(self, rows: fx.Node, valid: fx.Node, projection: Projection) -> fx.Node:
        factors = self._factors(projection)
        return self.rewriter.call(_OPS.predicted_norms.default, rows, valid, *factors, self._bias(projection))

    def _random(self, channels: int, source: str) -> fx.Node:
        return self.rewriter.call(torch.rand, channels, device=self._device(source))

    def _device(self, source: str) -> torch.device:
        value = tensor_of(self.nodes[source])
        return value.device

    def _top(self, scores: fx.Node, kept: int, site: str, source: str) -> fx.Node:
        scores = self.rewriter.method("detach", scores)
        node = self.rewriter.call(_OPS.top_channels.default, scores, kept, site, *self.dense_step)
        node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        return node
