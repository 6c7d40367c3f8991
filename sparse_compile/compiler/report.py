"""Put together what was found in compiled graphs and what was done about it, and hand it out as text, data or page."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from sparse_compile.compiler.capture import TokenCounts
from sparse_compile.compiler.graph_texts import GraphTexts
from sparse_compile.compiler.page.render import page_of
from sparse_compile.compiler.pipeline import PASSES
from sparse_compile.compiler.report_data import GraphReport, PassReport, SiteReport, StepReport
from sparse_compile.compiler.report_reasons import places_of, why_not_asked
from sparse_compile.compiler.report_text import report_text
from sparse_compile.compiler.report_words import summary
from sparse_compile.compiler.runner import PipelineResult
from sparse_compile.compiler.unmatched import unmatched_of
from sparse_compile.graph.cost import LOSS, OUTPUT, saved_flops
from sparse_compile.graph.facts import ProductOrder, SitePlan, SparsityPlan
from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.passes.context import PassContext
from sparse_compile.passes.exact.select_loss_rows import ON_LOSS_ROWS

__all__ = ["GraphReport", "PassReport", "Report", "SiteReport", "graph_report", "plan_data", "report_of"]


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
class Report(StepReport):
    """What `explain` found: one training step of a model, which may arrive in several graphs."""

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
