"""Say, once for each model, what its training run does: how much of it is sparse, and from which step on."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from sparse_compile.compiler.model_part import ModelPart
from sparse_compile.compiler.outputs import CompiledGraph
from sparse_compile.compiler.report import GraphReport
from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.training.news import say
from sparse_compile.training.schedule import DENSE
from sparse_compile.training.session import Session

__all__ = ["announced", "noticing_evaluation_mode", "run_line"]

_WAYS = "start_step=..., schedule=Schedule(total_steps=...) or SparseLoRACallback"


def announced(
    compiled: CompiledGraph, session: Session, report: GraphReport, config: SparseLoRAConfig, *, whole_step: bool
) -> CompiledGraph:
    """Have the first forwards of a sparse graph say what the run does, once it is known.

    A graph that is a whole step knows it at once. Of several graphs all are compiled, and known to be one model, when
    an optimizer has stepped. A graph of fixed sizes is for one phase: the sparse one is told of.

    Args:
        compiled: the graph.
        session: what is known of its model.
        report: of this graph.
        config: what the user chose.
        whole_step: whether the graph is a whole training step.
    """
    fixed = config.token_bucket is not None or config.token_capacity is not None
    told = False

    def run(*args: Any) -> Any:
        nonlocal told
        together = [session] if whole_step else session.together
        if not told and together and not (fixed and session.phase == DENSE):
            told = True
            fresh = [each.once("what the run does") for each in together]  # each is told, so that none says it again
            if all(fresh):
                graphs = [report] if whole_step else [graph for each in together for graph in each.reports]
                say(run_line(graphs, session, config))
        return compiled(*args)

    return run


def run_line(reports: Sequence[GraphReport], session: Session, config: SparseLoRAConfig) -> str:
    """Return what a run does: sparse sites, FLOPs of a sparse step, and the steps that are sparse."""
    sites = {site.name: site.sparse for report in reports for site in report.sites}
    left = next(
        (f"context leaves before {site.name}, " for report in reports for site in report.sites if site.left), ""
    )
    before, after = (sum(getattr(report, name) for report in reports) for name in ("flops_before", "flops_after"))
    return (
        f"{sum(sites.values())} of {len(sites)} sites sparse, {left}{after / before - 1:+.0%} FLOPs of a step, "
        + _when(session, config)
    )


def _when(session: Session, config: SparseLoRAConfig) -> str:
    """Return which steps are sparse, and how to choose them where nobody did."""
    window = session.window
    if window is None:
        return "sparse once the length of the run is known"
    first, last = window
    if last is not None and last <= first:
        return "but no step of the run is sparse"
    steps = f"sparse from step {first}" + ("" if last is None else f" to step {last - 1}")
    if config.dense_period is not None:
        steps += f", one of {config.dense_period} steps dense"
    if config.start_step is None and session.schedule.total_steps is None:
        steps += f" (the length of the run is not known; to choose: {_WAYS})"
    return steps


def noticing_evaluation_mode(
    compiled: CompiledGraph, part: ModelPart | None, session: Session, report: GraphReport
) -> CompiledGraph:
    """Have the first training forward in evaluation mode say so, of a model that computes a loss to train on.

    That is seen in each forward: a model without dropout is not compiled anew for another mode.
    """
    if part is None or not report.roles:
        return compiled
    model = weakref.ref(part.model)

    def run(*args: Any) -> Any:
        living = model()
        if living is not None and not living.training and session.once("evaluation mode"):
            say(
                "this model computes a loss with gradients in eval mode, so its dropout is off. Call model.train() to "
                "train it, or evaluate under torch.no_grad(), which runs dense"
            )
        return compiled(*args)

    return run
