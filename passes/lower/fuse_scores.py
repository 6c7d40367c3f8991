"""Compute the scores of a sparse feed-forward block's channels in two generated kernels.

    %gate = low_rank_product(%few, %ga, %gb)
    %up   = low_rank_product(%few, %ua, %ub)
    %bias = add(%gate, %b)                               %norm = predicted_scores(%few, %valid, [%ga, %ua],
    %h    = mul(silu(%bias), %up)                  ->            [%gb, %ub], [%b], 'p1*(p0 + v0)*sigmoid(p0 + v0)', ..)
    %norm = vector_norm(where(%valid, %h, 0), 0)
    %kept = top_channels(%norm, k)                       %kept = top_channels(%norm, k)

The block's elementwise region, which `insert_predictors` copied for a few tokens, is lifted into a formula
(`kernels/codegen`), from the norm back to the products. A composed score is some eight launches for each block.

Legal because: the formula is the region and every sum is one of fp32, as before; only roundings between them go. Scores
are not differentiated.

Declines when: the kernels are not asked for (`kernels="triton"`) or do not run on the device; factors of a rank above
63; a call has no formula; the region writes to what it reads again. A block whose channels are drawn has no score.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from sparse_compile.graph.declined import Declined
from sparse_compile.graph.facts import Rejection
from sparse_compile.graph.read import nodes_by_name, op_name, tensor_value
from sparse_compile.graph.rewrite import Rewriter, take_over
from sparse_compile.graph.sites import FFNSite
from sparse_compile.graph.vocabulary import TAG
from sparse_compile.kernels.channel_selection import PREDICTED_SCORES
from sparse_compile.kernels.codegen.elementwise import constant, lift
from sparse_compile.kernels.codegen.formula import Formula
from sparse_compile.kernels.codegen.score_source import ScoreSpec, score_source
from sparse_compile.kernels.providers import REFERENCE
from sparse_compile.passes.context import PassContext, declined_providers
from sparse_compile.passes.protocol import Pass, PassOutcome
from sparse_compile.passes.read.mutation import overwritten

_OPS = torch.ops.sparselora


class FuseScores(Pass):
    """Rewrite the scores of the sparse feed-forward sites."""

    requires = ("predictors",)
    # Both read the choices of channels; this pass replaces what those rank.
    after = ("sparsify_ffn", "sparsify_attention")
    optimises = True

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassOutcome:
        """Rewrite the graph in place."""
        if ctx.env.config.kernels != "triton":
            return PassOutcome(False)
        rewriter = Rewriter(gm, self.name)
        nodes = nodes_by_name(gm.graph)
        rejections: dict[Rejection, None] = {}
        fused = 0
        for plan in ctx.facts.plan.predicted_sites:
            if not isinstance(plan.site, FFNSite):
                continue
            (kept,) = ctx.facts.selections[plan.site.identity]
            norm = _norm(nodes[kept])
            if norm is None:
                continue
            choice = PREDICTED_SCORES.choose(ctx.op_call(plan), ctx.env.config.kernels)
            if choice.provider == REFERENCE:
                rejections |= declined_providers(self.name, "predicted_scores", choice)
                continue
            try:
                score = _Score(norm)
            except Declined as declined:
                rejections[declined.by(self.name, at=plan.site.name)] = None
                continue
            title = f"{plan.site.name}.score"
            ctx.add_sources({f"{title}.py": score_source(score.spec(gm), title)})
            with rewriter.before(norm, plan.site.name):
                take_over(norm, score.insert(rewriter))
            fused += 1
        return PassOutcome(fused > 0, {"fused": fused, "inserted": rewriter.inserted}, tuple(rejections))


def _norm(kept: fx.Node) -> fx.Node | None:
    """Return the norm over tokens that a choice of channels ranks, or None where it ranks something else."""
    score = kept.args[0]
    while isinstance(score, fx.Node) and op_name(score) == "detach":
        score = score.args[0]
    return score if isinstance(score, fx.Node) and score.target is torch.linalg.vector_norm else None


@dataclass
class _Score:
    """What lies between predicted products and the norm over the tokens that count.

    Attributes:
        norm: the norm.
        products: the low-rank products, `p0` first.
        vectors: what has one value a channel, or one in all, `v0` first.
        formula: what is computed of them.

    Raises:
        Declined: it has no formula.
    """

    norm: fx.Node
    products: list[fx.Node] = field(default_factory=list)
    vectors: list[fx.Node] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lifted: dict[fx.Node, sympy.Expr] = {}
        counts, hidden, _ = _arguments(_arguments(self.norm)[0])
        self.valid = _arguments(counts)[0]
        self.formula = Formula.of(self._lift(hidden))

    def insert(self, rewriter: Rewriter) -> fx.Node:
        """Insert the op that computes the score; return it."""
        inputs, a_factors, b_factors = zip(*map(_arguments, self.products), strict=True)
        (x,) = set(inputs)  # the in-projections of a site read one tensor
        return rewriter.call(
            _OPS.predicted_scores.default,
            x, self.valid, list(a_factors), list(b_factors), self.vectors, self.formula.text, provider=REFERENCE,
        )  # fmt: skip

    def spec(self, gm: fx.GraphModule) -> ScoreSpec:
        """Return what is to be generated for it."""
        factors = (operator.attrgetter(_arguments(product)[2].target)(gm) for product in self.products)
        return ScoreSpec(tuple(factor.shape[0] for factor in factors), len(self.vectors), self.formula.text)

    def _lift(self, node: fx.Node) -> sympy.Expr:
        if node not in self._lifted:
            self._lifted[node] = self._expression(node)
        return self._lifted[node]

    def _expression(self, node: fx.Node) -> sympy.Expr:
        if node.target is _OPS.low_rank_product.default:
            self.products.append(node)
            return sympy.Symbol(f"p{len(self.products) - 1}")
        if not _is_predicted(node):
            if tensor_value(node) is None:
                raise Declined(node, f"{node.name} is no tensor")
            self.vectors.append(node)
            return sympy.Symbol(f"v{len(self.vectors) - 1}")
        if (written := overwritten(node)) is not None:
            raise Declined(node, f"{op_name(node)} writes to {written.name}, which is read again")
        return lift(node, lambda operand: self._lift(operand) if isinstance(operand, fx.Node) else constant(operand))


def _arguments(node: Any) -> tuple[Any, ...]:
    arguments: tuple[Any, ...] = node.args
    return arguments


def _is_predicted(node: fx.Node) -> bool:
    """Tell whether a node is computed from predicted products by what was inserted with them."""
    inserted = node.meta.get(TAG, {}).get("pass") == "insert_predictors"
    is_product = node.target is _OPS.low_rank_product.default
    return is_product or (inserted and any(map(_is_predicted, node.all_input_nodes)))
