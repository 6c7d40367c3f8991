"""What was found in one compiled graph, and what was done about it, as plain data."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from sparse_compile.compiler.capture import TokenCounts
from sparse_compile.compiler.graph_texts import GraphTexts
from sparse_compile.compiler.page.render import page_of
from sparse_compile.compiler.pipeline import PASSES
from sparse_compile.compiler.report_reasons import places_of, why_not_asked
from sparse_compile.compiler.report_text import graph_text, report_text
from sparse_compile.compiler.report_words import summary
from sparse_compile.compiler.runner import PassRecord, PipelineResult
from sparse_compile.compiler.unmatched import unmatched_of
from sparse_compile.graph.cost import LOSS, OUTPUT, saved_flops
from sparse_compile.graph.facts import MaskedLayer, ProductOrder, Rejection, SitePlan, SparsityPlan
from sparse_compile.options.config import SparseLoRAConfig
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
        why_dense: why it is dense, asked for or not; empty where it is sparse.
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
    why_dense: str = ""

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
        places: where in the model the nodes stand that rejections name; nodes without a place there are left out.
        all_trained: whether every parameter is trained, so that no layer is frozen.
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
    places: Mapping[str, str]
    all_trained: bool
    flops_before: float
    flops_after: float
    weight_flops_before: float
    weight_flops_after: float

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return graph_text(self)


def graph_report(
    result: PipelineResult, ctx: PassContext, compile_id: str, tokens: TokenCounts, path: str = ""
) -> GraphReport:
    """Summarise a run of the pipeline.

    Args:
        result: its outcome.
        ctx: its facts.
        compile_id: Dynamo's name of the compilation.
        tokens: numbers of tokens to give FLOPs for.
        path: where in its model the captured part stands; empty for a whole model.
    """
    counts = {OUTPUT: tokens.output, LOSS: tokens.loss}
    before, of_weights_before = result.flops_before.at(counts)
    after, of_weights_after = result.flops_after.at(counts)
    totals = [before, *(flops.at(counts)[0] for flops in result.flops)]
    passes = [PassReport(record, *pair) for record, pair in zip(result.records, pairwise(totals), strict=True)]
    adapters = [branch for projection in ctx.facts.projections.values() for branch in projection.adapters]
    rejections = (*result.rejections, *unmatched_of(result, ctx))
    graphs = [graph for graph in (result.sparse, result.exact, result.canonical) if graph is not None]
    trained = [parameter.trained for parameter in ctx.env.parameters.values()]
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
        rejections=rejections,
        places=places_of(rejections, graphs, ctx, path),
        all_trained=bool(trained) and all(trained),
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
        reason = f"{_rewrites(kind)} did not run" if left_out else plan.reason
        dense = left_out or not plan.split
        sites.append(
            SiteReport(
                name=plan.site.name,
                kind=plan.site.kind,
                sparsity=0.0 if left_out else plan.sparsity,
                kept=plan.total if left_out else plan.kept,
                total=plan.total,
                provider=_provider(plan, ctx),
                reason=reason,
                adapters=sum(len(projection.adapters) for projection in plan.site.projections),
                left=plan.left and not left_out,
                why_dense=(reason or why_not_asked(plan, ctx)) if dense else "",
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
        texts: of each graph, its text after each pass.
        expected_seconds: what the calibration of a recipe says of a step: of a dense one as it was measured, and of a
            sparse one as it is expected; None where nothing was measured.
        untrained: why there is no graph, where there is none.
    """

    graphs: tuple[GraphReport, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    options_from: str = "the defaults"
    texts: tuple[GraphTexts, ...] = field(default=(), repr=False, compare=False)
    expected_seconds: tuple[float, float] | None = None
    untrained: str = "no graph was captured"

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
            "summary": summary(self),
            "options": json.loads(json.dumps(self.options, default=repr)),
            "options_from": self.options_from,
            "flops_before": self.flops_before,
            "flops_after": self.flops_after,
            "graphs": [graph.to_dict() for graph in self.graphs],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report: `.html` as one page to look through, `.json` as data, `.txt` as text.

        Raises:
            ValueError: for another suffix.
        """
        target = Path(path)
        if target.suffix == ".html":
            text = page_of(self)
        elif target.suffix == ".json":
            text = json.dumps(self.to_dict(), indent=2) + "\n"
        elif target.suffix == ".txt":
            text = f"{self}\n"
        else:
            suffix = repr(target.suffix) if target.suffix else "a file without suffix"
            raise ValueError(f"a report is saved as .html, .json or .txt, not as {suffix}")
        target.write_text(text, encoding="utf-8")

    def __str__(self) -> str:
        return report_text(self)


def report_of(
    graphs: Iterable[GraphReport],
    texts: Iterable[GraphTexts],
    config: SparseLoRAConfig,
    options_from: str,
    untrained: str = "no graph was captured",
) -> Report:
    """Put the reports of graphs together.

    Args:
        graphs: of one training step.
        texts: of each graph, its text after each pass.
        config: the options that it is for.
        options_from: where they come from.
        untrained: why there is no graph, where there is none.
    """
    written = config.to_options()
    options = written if config.site_option else {"preset": config.preset, **written}
    return Report(tuple(graphs), options, options_from, tuple(texts), _expected_seconds(config), untrained)


def _expected_seconds(config: SparseLoRAConfig) -> tuple[float, float] | None:
    """Return the seconds of a dense step and of a sparse one, as the calibration of a recipe has them; else None."""
    origin = {} if config.recipe is None else config.recipe.origin
    dense, sparse = origin.get("step_seconds"), origin.get("expected_step_seconds")
    return (dense, sparse) if isinstance(dense, float) and isinstance(sparse, float) else None
