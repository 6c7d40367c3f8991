"""The TorchDynamo backend `sparselora`: capture, pipeline, Inductor."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

import sparse_compile.kernels  # noqa: F401  (registers torch.ops.sparselora)
from sparse_compile.capture import capture_context, count_tokens, is_whole_step, trained_parameters
from sparse_compile.config import SparseLoRAConfig
from sparse_compile.dump import GraphDump, dump_root
from sparse_compile.passes.base import PassContext
from sparse_compile.pipeline import PipelineResult, run_pipeline
from sparse_compile.report import GraphReport, graph_report, plan_data, summary_of
from sparse_compile.session import Session, session_for
from sparse_compile.torch_private import (
    compile_id,
    compile_with_inductor,
    frame_key,
    install_value_guard,
    is_control_flow_exception,
)

_LOG = logging.getLogger(__name__)
_matched: set[SparseLoRAConfig] = set()
_told: set[object] = set()

CompiledGraph = Callable[..., Any]


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
    """
    config = SparseLoRAConfig.from_options(options)
    ctx = capture_context(gm, example_inputs, config)

    def dense() -> CompiledGraph:
        return compile_with_inductor(gm, example_inputs, config.inductor, mode)

    if not torch.is_grad_enabled():
        return dense()
    trained = trained_parameters(gm, example_inputs, ctx)
    if not trained:
        _tell_untrained(gm, ctx)
        return dense()

    session = session_for(trained, config)
    root = dump_root(config.dump_dir)
    dump = GraphDump(root, compile_id(gm)) if root else None
    result = run_pipeline(gm, ctx, dump)
    phase = session.phase
    report = graph_report(result, ctx, compile_id(gm), phase, count_tokens(gm, example_inputs, ctx))
    session.reports.append(report)
    _LOG.info("sparselora: graph %s\n%s", report.compile_id, report)
    if dump is not None:
        dump.data("plan", plan_data(ctx.plan))
        dump.data("manifest", report.to_dict())
    _tell_about_sites(gm, ctx, session, report)

    install_value_guard("sparse_compile.roles", "ROLES_GIVEN")
    compiled = None
    if result.gm is not None:
        install_value_guard("sparse_compile.session", "PHASES", session.id)
        if phase == "sparse":
            compiled = _compile_sparse(result, example_inputs, config, mode)
    return _counted(compiled or dense(), session, frame_key(gm))


def _compile_sparse(
    result: PipelineResult, example_inputs: Sequence[Any], config: SparseLoRAConfig, mode: str | None
) -> CompiledGraph | None:
    """Compile the rewritten graph; None, with a warning, where that fails."""
    assert result.gm is not None
    try:
        return compile_with_inductor(result.gm, example_inputs, config.inductor, mode)
    except Exception as error:
        if config.strict or is_control_flow_exception(error):
            raise
        reason = f"{type(error).__name__}: {error}"
        warnings.warn(f"sparselora: the sparse graph did not compile, so it runs dense. {reason}", stacklevel=2)
        return None


def _counted(compiled: CompiledGraph, session: Session, key: int) -> CompiledGraph:
    """Tell the session of every run of a compiled training graph."""

    def run(*args: Any) -> Any:
        session.note_training_forward(key)
        return compiled(*args)

    return run


def _asks_for_sparsity(config: SparseLoRAConfig) -> bool:
    if config.layer_sparsity is not None:
        return any(config.layer_sparsity.values())
    return config.preset in ("o1", "o2")


def _tell_about_sites(gm: fx.GraphModule, ctx: PassContext, session: Session, report: GraphReport) -> None:
    """Warn, once each, about what was asked for and is not there."""
    config = ctx.config
    session.add_site_names(site.name for site in report.sites)
    if config.layer_sparsity is not None:
        session.expect_sites(config.layer_sparsity)
        if is_whole_step(gm, ctx):
            session.check_sites_now()
    for rejection in report.rejections:
        if rejection.rule == "plan_sparsity" and session.once(("declined", rejection.node)):
            warnings.warn(f"sparselora: site {rejection.node} stays dense: {rejection.reason}", stacklevel=2)
    if ctx.plan.sparse_sites:
        _matched.add(config)
    elif _asks_for_sparsity(config) and is_whole_step(gm, ctx) and session.once("nothing matched"):
        warnings.warn(_nothing_matched(ctx, report), stacklevel=2)


def _nothing_matched(ctx: PassContext, report: GraphReport) -> str:
    adapters = sum(len(projection.branches) for projection in ctx.projections.values())
    wanted = "layer_sparsity" if ctx.config.layer_sparsity is not None else f"preset {ctx.config.preset!r}"
    found = (
        f"{len(ctx.projections)} frozen linear layers with {adapters} adapters, {len(ctx.ffn_sites)} feed-forward and "
        f"{len(ctx.attention_sites)} attention blocks, token roles from {report.roles or 'nowhere'}"
    )
    reasons = summary_of(report.rejections, most=6)
    if ctx.sites and not reasons:
        reasons = [f"  {wanted} asks for no sparsity at any of the {len(ctx.sites)} sites of so shallow a model"]
    lines = [
        f"sparselora: {wanted} asks for sparsity and no site became sparse, so training runs dense.",
        "Looked for: feed-forward and attention blocks of frozen linear layers, and labels that mark output tokens.",
        f"Found: {found}.",
        "Declined:",
        *(reasons or ["  nothing: there was nothing to match"]),
    ]
    return "\n".join(lines)


def _tell_untrained(gm: fx.GraphModule, ctx: PassContext) -> None:
    """Warn once where sparsity was asked for and a graph with a loss trains nothing."""
    if not (_asks_for_sparsity(ctx.config) and is_whole_step(gm, ctx)):
        return
    key = frozenset(parameter.path for parameter in ctx.parameters.values())
    if key not in _told:
        _told.add(key)
        warnings.warn(
            "sparselora: no parameter of this model is trained (no adapter, or all frozen), so it runs dense. Add an "
            "adapter, for example with peft.get_peft_model, before training.",
            stacklevel=2,
        )
