"""The TorchDynamo backend `sparselora`: capture, passes, Inductor."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

import sparse_compile.kernels  # noqa: F401  (registers torch.ops.sparselora)
from sparse_compile.compiler.capture import capture_context, count_tokens, is_whole_step, trained_parameters
from sparse_compile.compiler.dump import GraphDump, dump_root
from sparse_compile.compiler.executable import compile_as_it_is, compile_first, watched
from sparse_compile.compiler.guards import install_guards
from sparse_compile.compiler.map_watch import held_for_maps, maps_are_stale, with_fitted_maps
from sparse_compile.compiler.mask_watch import guard_masks, tell_unmasked, watching_masks
from sparse_compile.compiler.model_part import ModelPart, part_of
from sparse_compile.compiler.notices import (
    tell_about_sites,
    tell_about_slots,
    tell_at_last_graph,
    tell_once,
    tell_untrained,
)
from sparse_compile.compiler.outputs import CompiledGraph, restored
from sparse_compile.compiler.peft_support import make_dora_traceable
from sparse_compile.compiler.pipeline import EVALUATION_PASSES
from sparse_compile.compiler.report import GraphReport, graph_report, plan_data
from sparse_compile.compiler.report_text import graph_text
from sparse_compile.compiler.run_notices import announced, noticing_evaluation_mode
from sparse_compile.compiler.runner import PipelineResult, run_pipeline
from sparse_compile.compiler.weight_watch import with_fresh_factors
from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.passes.context import PassContext
from sparse_compile.passes.protocol import RequestedFunctionError
from sparse_compile.torch_private.dynamo import compile_id, frame_key
from sparse_compile.training.progress import compiling, stage
from sparse_compile.training.schedule import DENSE
from sparse_compile.training.session import Session, session_for
from sparse_compile.training.sharded import any_in_parts, is_sharded
from sparse_compile.training.told import IN_PROCESS

# Dynamo imports this module when it looks up the backend's name, before it traces anything.
make_dora_traceable()

_LOG = logging.getLogger(__name__)


def sparselora(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> CompiledGraph:
    """Compile a captured graph; called by TorchDynamo for `backend="sparselora"`.

    Args:
        gm: the graph.
        example_inputs: its inputs.
        options: the fields of `SparseLoRAConfig`, as a plain mapping.
        mode: a mode of Inductor, such as `"max-autotune"`.

    Raises:
        ValueError: an invalid option, or (strict) a site name that matches nothing. TorchDynamo wraps it.
        RequestedFunctionError: the function that an option asks for cannot be made of the graph. TorchDynamo wraps it.
    """
    make_dora_traceable()  # PEFT may have been imported since: then for what is traced from now on
    config = SparseLoRAConfig.from_options(options)
    tell_at_last_graph(gm, config)
    part = part_of(gm)
    graph = _Graph(gm, example_inputs, capture_context(gm, example_inputs, config, part), part, mode)
    if any_in_parts(example_inputs):
        return _in_parts(graph)
    trained = trained_parameters(gm, example_inputs, graph.ctx)
    if trained and torch.is_grad_enabled():
        with compiling():
            return _training(graph, trained)
    if torch.is_grad_enabled():
        tell_untrained(gm, graph.ctx, None if part is None else part.model)
    return _evaluation(graph, trained)


@dataclass(frozen=True)
class _Graph:
    """A captured graph on its way through the backend.

    Attributes:
        gm: the graph.
        example_inputs: its inputs.
        ctx: what passes share.
        part: the part of a model that it was captured from, None for a whole model.
        mode: a mode of Inductor.
    """

    gm: fx.GraphModule
    example_inputs: Sequence[Any]
    ctx: PassContext
    part: ModelPart | None
    mode: str | None

    @property
    def config(self) -> SparseLoRAConfig:
        """The user's options."""
        return self.ctx.env.config

    @property
    def path(self) -> str:
        """Where in its model the part stands; empty for a whole model."""
        return "" if self.part is None else self.part.path

    @property
    def masks(self) -> bool:
        """Whether zeros of pruned weights are to be kept."""
        return "preserve_weight_mask" in self.config.requested

    def dense(self, gm: fx.GraphModule | None = None) -> CompiledGraph:
        """Compile a graph with Inductor alone: the captured one, unless another is given."""
        return compile_as_it_is(gm or self.gm, self.example_inputs, self.config, self.mode)


def _in_parts(graph: _Graph) -> CompiledGraph:
    """Compile a graph whose parameters are spread over ranks."""
    reason = "parameters of this model are DTensors, of which each rank holds a part (tensor parallel)"
    if graph.masks:
        raise RequestedFunctionError(f"preserve_weight_mask needs whole weights: {reason}")
    tell_once(f"{reason}. Predictors need whole weights, so it runs dense, without the exact passes")
    return graph.dense()


def _evaluation(graph: _Graph, trained: Sequence[Tensor]) -> CompiledGraph:
    """Compile a graph without gradients: as it was captured, but for the function that an option asks for."""
    if not graph.masks:
        return graph.dense()
    masked = run_pipeline(graph.gm, graph.ctx, order=EVALUATION_PASSES).exact
    session = session_for(trained, graph.config) if trained else None
    guard_masks(graph.gm, graph.ctx, session)
    tell_unmasked(graph.ctx, IN_PROCESS.once if session is None else session.once)
    return graph.dense(masked)


def _training(graph: _Graph, trained: Sequence[Tensor]) -> CompiledGraph:
    """Compile a graph of a training step."""
    gm, ctx = graph.gm, graph.ctx
    model = graph.part.model if graph.part is not None and is_sharded(graph.part.model) else None
    session = session_for(trained, graph.config, sharded=model)
    ctx.env = replace(
        ctx.env,
        dense_step=session.dense_step,
        all_output=session.phase == DENSE,
        online_maps={identity: each.surrogate for identity, each in session.online_maps.items()},
        maps_are_stale=maps_are_stale(session),
        model_key=str(session.id),
    )
    root = dump_root(graph.config.dump_dir)
    dump = GraphDump(root, compile_id(gm)) if root else None
    result = run_pipeline(gm, ctx, dump)
    if ctx.facts.slots is not None and held_for_maps(ctx, session):
        # The sizes that were planned are those of a sparse step.
        fresh = capture_context(gm, graph.example_inputs, graph.config, graph.part)
        return _training(replace(graph, ctx=fresh), trained)
    tokens = count_tokens(result.canonical, graph.example_inputs, ctx)
    report = graph_report(result, ctx, compile_id(gm), tokens, graph.path)
    _tell(graph, session, result, report)
    if dump is not None:
        _write(dump, ctx, report)
    install_guards(gm, ctx, session, path=graph.path, sparse=result.sparse is not None)
    rewritten = {"sparse": result.sparse, "optimised": result.exact}
    stage("forward and backward, by Inductor")
    kind, compiled = compile_first(rewritten, graph.example_inputs, ctx, graph.mode)
    if compiled is not None and ctx.facts.loss_rows is not None:
        compiled = restored(compiled, gm, ctx.facts.loss_rows)
    compiled = compiled or graph.dense()
    whole_step = is_whole_step(gm, ctx)
    if kind == "sparse":
        compiled = with_fresh_factors(compiled, ctx, session, moves=model is not None)
        compiled = with_fitted_maps(compiled, ctx, session, moves=model is not None)
        compiled = announced(compiled, session, report, graph.config, whole_step=whole_step)
    if graph.masks:
        compiled = watching_masks(compiled, ctx, session, whole_step=whole_step)
    compiled = noticing_evaluation_mode(compiled, graph.part, session, report)
    return watched(compiled, session, report, graph.config, (frame_key(gm), graph.path))


def _tell(graph: _Graph, session: Session, result: PipelineResult, report: GraphReport) -> None:
    """Hand the report on: to the session, to the log, and in warnings to the user."""
    session.reports.append(report)
    _LOG.info("sparselora: graph %s\n%s", report.compile_id, graph_text(report))
    tell_about_sites(graph.gm, graph.ctx, session, report, failed=result.failed_to_approximate)
    tell_about_slots(session, report)


def _write(dump: GraphDump, ctx: PassContext, report: GraphReport) -> None:
    """Write what stands beside the graphs in a dump."""
    for name, source in ctx.results.kernel_sources.items():
        dump.kernel(name, source)
    dump.data("plan", plan_data(ctx.facts.plan, ctx.facts.product_orders))
    dump.data("manifest", report.to_dict())
    dump.page(report, ctx.env.config)
