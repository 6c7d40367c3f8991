"""What was found in one compiled graph, and what was done about it, as plain data."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from tabulate import tabulate

from sparse_compile.compiler.capture import TokenCounts
from sparse_compile.compiler.pipeline import PASSES
from sparse_compile.compiler.runner import PassRecord, PipelineResult
from sparse_compile.compiler.unmatched import unmatched_of
from sparse_compile.graph.cost import LOSS, OUTPUT, saved_flops
from sparse_compile.graph.facts import MaskedLayer, ProductOrder, Rejection, SitePlan, SparsityPlan
from sparse_compile.passes.context import PassContext
from sparse_compile.passes.exact.select_loss_rows import ON_LOSS_ROWS


@dataclass(frozen=True)
class SiteReport:
    """One matched site, dense or sparse.

    Attributes:
        name: site name, as `layer_sparsity` takes it.
        kind: `"ffn"` or `"attention"`.
        sparsity: fraction of channels not computed for context tokens; 0 where dense.
        kept: channels kept.
        total: channels to choose from.
        provider: what runs its products: `"map of rank 32"` where a map stands in its place for context tokens,
            `"context left"` where they have left the residual stream before it,
            `"dense"` where nothing was rewritten, `"loss_rows"` where only rows of the loss are left of a block that
            was to be sparse.
        reason: why it stays dense although it was asked for, or a note.
        adapters: number of LoRA branches at the site.
        left: whether context tokens have left the residual stream before it.
    """

    name: str
    kind: str
    sparsity: float
    kept: int
    total: int
    provider: str
    reason: str
    adapters: int
    left: bool = False

    @property
    def sparse(self) -> bool:
        """Whether less is computed of context tokens than of output tokens."""
        return self.left or self.kept < self.total


@dataclass(frozen=True)
class PassReport:
    """One pass: what it did (`record`) and the FLOPs of a training step before and after it."""

    record: PassRecord
    flops_before: float
    flops_after: float


@dataclass(frozen=True)
class GraphReport:
    """One compiled graph.

    Attributes:
        compile_id: Dynamo's name of the compilation.
        roles: where token roles come from: `"cross_entropy"`, `"labels"`, `"given"`, or None.
        tokens: what FLOPs are given for.
        projections, adapters: number of frozen linear layers, and of LoRA branches beside them.
        frozen_adapters: number of those branches that are not trained.
        sites: every matched site.
        passes: every pass.
        masks: the pruned layers with an adapter, where their zeros are to be kept.
        orders: the order of the products of each layer that could have another.
        rejections: every place where a pass looked and did not apply.
        flops_before, flops_after: FLOPs of the matrix products of a training step, as captured and as it will run.
        weight_flops_before, weight_flops_after: those of the products with frozen weights alone.
    """

    compile_id: str
    roles: str | None
    tokens: TokenCounts
    projections: int
    adapters: int
    frozen_adapters: int
    sites: tuple[SiteReport, ...]
    passes: tuple[PassReport, ...]
    masks: tuple[MaskedLayer, ...]
    orders: tuple[ProductOrder, ...]
    rejections: tuple[Rejection, ...]
    flops_before: float
    flops_after: float
    weight_flops_before: float
    weight_flops_after: float

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON."""
        return asdict(self)


def graph_report(result: PipelineResult, ctx: PassContext, compile_id: str, tokens: TokenCounts) -> GraphReport:
    """Summarise a run of the pipeline.

    Args:
        result: its outcome.
        ctx: its facts.
        compile_id: Dynamo's name of the compilation.
        tokens: numbers of tokens to give FLOPs for.
    """
    counts = {OUTPUT: tokens.output, LOSS: tokens.loss}
    before, of_weights_before = result.flops_before.at(counts)
    after, of_weights_after = result.flops_after.at(counts)
    totals = [before, *(flops.at(counts)[0] for flops in result.flops)]
    passes = [PassReport(record, *pair) for record, pair in zip(result.records, pairwise(totals), strict=True)]
    adapters = [branch for projection in ctx.facts.projections.values() for branch in projection.adapters]
    return GraphReport(
        compile_id=compile_id,
        roles=ctx.facts.roles.origin if ctx.facts.roles else None,
        tokens=tokens,
        projections=len(ctx.facts.projections),
        adapters=len(adapters),
        frozen_adapters=sum(not branch.trained for branch in adapters),
        sites=_sites(result, ctx),
        passes=tuple(passes),
        masks=ctx.facts.masked_layers,
        orders=ctx.facts.product_orders,
        rejections=(*result.rejections, *unmatched_of(result, ctx)),
        flops_before=before,
        flops_after=after,
        weight_flops_before=of_weights_before,
        weight_flops_after=of_weights_after,
    )


def _sites(result: PipelineResult, ctx: PassContext) -> tuple[SiteReport, ...]:
    sites = []
    for plan in ctx.facts.plan.sites:
        kind = "exit" if plan.left else plan.site.kind
        left_out = plan.split and kind not in result.made_sparse
        sites.append(
            SiteReport(
                name=plan.site.name,
                kind=plan.site.kind,
                sparsity=0.0 if left_out else plan.sparsity,
                kept=plan.total if left_out else plan.kept,
                total=plan.total,
                provider=_provider(plan, ctx),
                reason=f"{_rewrites(kind)} did not run" if left_out else plan.reason,
                adapters=sum(len(projection.adapters) for projection in plan.site.projections),
                left=plan.left and not left_out,
            )
        )
    return tuple(sites)


def _rewrites(kind: str) -> str:
    """Return the pass that makes a kind of site sparse."""
    return next(each.name for each in PASSES if each.sparsifies == kind)


def _provider(plan: SitePlan, ctx: PassContext) -> str:
    if plan.reason == ON_LOSS_ROWS:
        return "loss_rows"
    if plan.left:
        rank = f", map of rank {ctx.facts.surrogates[plan.site.identity].rank}" if plan.mapped else ""
        return f"context left{rank}"
    if plan.mapped:
        return f"map of rank {ctx.facts.surrogates[plan.site.identity].rank}"
    return "+".join(ctx.results.providers.get(plan.site.name, ())) or "dense"


def plan_data(plan: SparsityPlan, orders: tuple[ProductOrder, ...] = ()) -> dict[str, Any]:
    """Return the decisions as plain data for JSON, with their cost over symbolic numbers of tokens."""
    return {
        "sites": [asdict(each) for each in plan.sites],
        "saved_flops": {kind: str(saved_flops(plan, kind)) for kind in ("ffn", "attention")},
        "product_orders": [asdict(order) | {"costs": dict(order.costs)} for order in orders],
    }


@dataclass(frozen=True)
class Report:
    """What `explain` found: one training step of a model, which may arrive in several graphs.

    Attributes:
        graphs: one report per graph.
        options: the options that it is for, those that differ from the defaults, and the preset.
        options_from: where they come from: `"config"` (the argument), `"the compiled model"`, `"the defaults"`, ...
    """

    graphs: tuple[GraphReport, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    options_from: str = "the defaults"

    @property
    def sites(self) -> tuple[SiteReport, ...]:
        """Every matched site of every graph."""
        return tuple(site for graph in self.graphs for site in graph.sites)

    @property
    def rejections(self) -> tuple[Rejection, ...]:
        """Every place where a pass looked and did not apply."""
        return tuple(rejection for graph in self.graphs for rejection in graph.rejections)

    @property
    def flops_before(self) -> float:
        """FLOPs of the matrix products of the training step as captured."""
        return sum(graph.flops_before for graph in self.graphs)

    @property
    def flops_after(self) -> float:
        """FLOPs of the training step as it will run."""
        return sum(graph.flops_after for graph in self.graphs)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON."""
        # A schedule, or a value for Inductor, need not be plain data.
        return {
            "options": json.loads(json.dumps(self.options, default=repr)),
            "options_from": self.options_from,
            "flops_before": self.flops_before,
            "flops_after": self.flops_after,
            "graphs": [graph.to_dict() for graph in self.graphs],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report: `.json` as data, `.txt` as the table.

        Raises:
            ValueError: for another suffix.
        """
        target = Path(path)
        if target.suffix == ".json":
            target.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        elif target.suffix == ".txt":
            target.write_text(str(self) + "\n", encoding="utf-8")
        else:
            raise ValueError(f"a report is saved as .json or .txt, not as {target.suffix or 'a file without suffix'!r}")

    def __str__(self) -> str:
        chosen = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        graphs = [_graph_text(graph) for graph in self.graphs] or ["no graph was captured"]
        return "\n\n".join([f"options, from {self.options_from}: {chosen}", *graphs])


def _graph_text(graph: GraphReport) -> str:
    counts = (
        f"{graph.tokens.context} context, {graph.tokens.output} output tokens, {graph.tokens.loss} rows of the loss"
    )
    adapters = counted_adapters(graph.adapters, graph.frozen_adapters)
    lines = [
        f"graph {graph.compile_id}: roles from {graph.roles or 'nowhere'}, {counts}",
        f"{graph.projections} frozen linear layers with {adapters}",
        "",
        table(
            ("site", "kind", "sparsity", "kept", "adapters", "provider", "note"),
            [
                (s.name, s.kind, f"{s.sparsity:g}", f"{s.kept}/{s.total}", str(s.adapters), s.provider, s.reason)
                for s in graph.sites
            ],
        ),
        "",
        table(
            ("pass", "changed", "nodes", "ms", "GFLOPs a step"),
            [
                (
                    each.record.name,
                    each.record.skipped or ("yes" if each.record.changed else "no"),
                    f"{each.record.nodes_before} -> {each.record.nodes_after}",
                    f"{each.record.milliseconds:.0f}",
                    f"{each.flops_before / 1e9:.3f} -> {each.flops_after / 1e9:.3f}",
                )
                for each in graph.passes
            ],
        ),
    ]
    if graph.masks:
        layers: list[tuple[str, ...]] = [
            (m.projection, f"{m.sparsity:.1%}", m.pattern, m.reason or "kept") for m in graph.masks
        ]
        lines += ["", table(("pruned layer", "zeros", "pattern", "mask"), layers)]
    if graph.orders:
        groups = Counter((order.order, order.break_even) for order in graph.orders)
        rows: list[tuple[str, ...]] = [(order, str(count), condition) for (order, condition), count in groups.items()]
        lines += ["", table(("products", "layers", "merging pays for"), rows)]
    if graph.rejections:
        lines += ["", "declined:", *summary_of(graph.rejections)]
    return "\n".join(lines)


def counted_adapters(adapters: int, frozen: int) -> str:
    """Return a number of adapters in words, with how many of them are not trained."""
    return f"{adapters} adapters" + (f", {frozen} of them frozen" if frozen else "")


def summary_of(rejections: tuple[Rejection, ...], most: int = 12) -> list[str]:
    """Return a line for each reason, with how often it was met and the first place."""
    counts = Counter((rejection.rule, rejection.reason) for rejection in rejections)
    first: Mapping[tuple[str, str], str] = {(r.rule, r.reason): r.node for r in reversed(rejections)}
    lines = [
        f"  {rule}: {reason} ({first[rule, reason]}" + (f" and {count - 1} more)" if count > 1 else ")")
        for (rule, reason), count in counts.most_common(most)
    ]
    left = len(counts) - most
    return lines if left <= 0 else [*lines, f"  and {left} more reasons"]


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return aligned columns of text."""
    return tabulate(rows, header, tablefmt="plain", disable_numparse=True)
