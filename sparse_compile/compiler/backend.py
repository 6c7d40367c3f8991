"""The TorchDynamo backend `sparselora`: capture, pipeline, Inductor."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

import sparse_compile.kernels  # noqa: F401  (registers torch.ops.sparselora)
from sparse_compile.compiler.cacheable import spell_as_functions
from sparse_compile.compiler.capture import capture_context, count_tokens, is_whole_step, trained_parameters
from sparse_compile.compiler.dump import GraphDump, dump_root
from sparse_compile.compiler.mask_watch import guard_masks, tell_unmasked, watching_masks
from sparse_compile.compiler.model_part import part_of
from sparse_compile.compiler.notices import (
    asks_for_sparsity,
    tell_about_sites,
    tell_about_slots,
    tell_once,
    tell_untrained,
    tell_when_all_is_compiled,
)
from sparse_compile.compiler.outputs import restored
from sparse_compile.compiler.peft_support import make_dora_traceable
from sparse_compile.compiler.pipeline import EVALUATION_PASSES
from sparse_compile.compiler.report import GraphReport, graph_report, plan_data
from sparse_compile.compiler.runner import run_pipeline
from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.passes.context import PassContext
from sparse_compile.passes.protocol import RequestedFunctionError
from sparse_compile.torch_private.autograd import saving_what_is_marked
from sparse_compile.torch_private.dynamo import (
    compile_id,
    frame_key,
    install_identity_guards,
    install_value_guard,
    is_control_flow_exception,
)
from sparse_compile.torch_private.inductor import compile_with_inductor
from sparse_compile.training.schedule import DENSE
from sparse_compile.training.session import Session, session_for
from sparse_compile.training.sharded import any_in_parts, is_sharded
from sparse_compile.training.token_capacity import watch
from sparse_compile.training.told import IN_PROCESS

# Dynamo imports this module when it looks up the backend's name, before it traces anything.
make_dora_traceable()

_LOG = logging.getLogger(__name__)

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
        RequestedFunctionError: the function that an option asks for cannot be made of the graph. TorchDynamo wraps it.
    """
    make_dora_traceable()  # PEFT may have been imported since: then for what is traced from now on
    config = SparseLoRAConfig.from_options(options)
    part = part_of(gm)
    ctx = capture_context(gm, example_inputs, config, part)

    def dense() -> CompiledGraph:
        return compile_with_inductor(gm, example_inputs, config.inductor, mode)

    masks = "preserve_weight_mask" in config.requested
    if any_in_parts(example_inputs):
        reason = "parameters of this model are DTensors, of which each rank holds a part (tensor parallel)"
        if masks:
            raise RequestedFunctionError(f"preserve_weight_mask needs whole weights: {reason}")
        tell_once(f"{reason}. Predictors need whole weights, so it runs dense, without the exact passes")
        return dense()
    trained = trained_parameters(gm, example_inputs, ctx)
    trains = torch.is_grad_enabled()
    if not trained and trains:
        tell_untrained(gm, ctx, None if part is None else part.model)
    if not trained or not trains:
        if not masks:
            return dense()
        requested = run_pipeline(gm, ctx, order=EVALUATION_PASSES).exact
        guard_masks(gm, ctx)
        tell_unmasked(ctx, session_for(trained, config).once if trained else IN_PROCESS.once)
        return compile_with_inductor(requested or gm, example_inputs, config.inductor, mode)

    model = part.model if part is not None and is_sharded(part.model) else None
    session = session_for(trained, config, sharded=model)
    root = dump_root(config.dump_dir)
    dump = GraphDump(root, compile_id(gm)) if root else None
    ctx.env = replace(ctx.env, dense_step=session.dense_step, all_output=session.phase == DENSE)
    result = run_pipeline(gm, ctx, dump)
    report = graph_report(result, ctx, compile_id(gm), count_tokens(result.canonical, example_inputs, ctx))
    session.reports.append(report)
    _LOG.info("sparselora: graph %s\n%s", report.compile_id, report)
    if dump is not None:
        for name, source in ctx.results.kernel_sources.items():
            dump.kernel(name, source)
        dump.data("plan", plan_data(ctx.facts.plan, ctx.facts.product_orders))
        dump.data("manifest", report.to_dict())
    tell_about_sites(gm, ctx, session, report, failed=result.failed_to_approximate)
    tell_about_slots(session, report)

    install_value_guard("sparse_compile.training.roles", "ROLES_GIVEN")
    if config.token_bucket is not None and ctx.facts.roles is not None:
        shift = 1 if ctx.facts.roles.origin == "given" else ctx.facts.roles.labels[0][1]
        install_value_guard("sparse_compile.training.token_capacity", "CAPACITIES", watch(config.token_bucket, shift))
    if result.sparse is not None and ctx.facts.slots is not None:
        install_value_guard("sparse_compile.training.phase", "PHASES", session.id)
    path = "" if part is None else part.path
    if result.sparse is not None or (path and ctx.facts.roles is not None and asks_for_sparsity(config)):
        # Blocks are alike: what is planned for one, dense or sparse, goes for no other.
        install_identity_guards(_inputs_of_this_model(gm, ctx))
    if masks:
        guard_masks(gm, ctx)
    rewritten = {"sparse": result.sparse, "optimised": result.exact}
    compiled = _compile_rewritten(rewritten, example_inputs, ctx, mode)
    if compiled is not None and ctx.facts.loss_rows is not None:
        compiled = restored(compiled, gm, ctx.facts.loss_rows)
    compiled = compiled or dense()
    if masks:
        compiled = watching_masks(compiled, ctx, session, whole_step=is_whole_step(gm, ctx))
    return _watched(compiled, session, report, config, (frame_key(gm), path))


def _inputs_of_this_model(gm: fx.GraphModule, ctx: PassContext) -> list[fx.Node]:
    """Return the inputs that tie a graph to its model: weights that were factorised, and what the session trains."""
    projections = [projection for plan in ctx.facts.plan.sparse_sites for projection in plan.site.projections]
    weights = {name for projection in projections for name in ctx.weight_inputs(projection)}
    trained = next(name for name, parameter in ctx.env.parameters.items() if parameter.trained)
    return [node for node in gm.graph.nodes if node.op == "placeholder" and node.name in weights | {trained}]


def _compile_rewritten(
    graphs: Mapping[str, fx.GraphModule | None],
    example_inputs: Sequence[Any],
    ctx: PassContext,
    mode: str | None,
) -> CompiledGraph | None:
    """Compile the first graph that compiles; None where there is none. One warning names those that did not.

    Raises:
        RequestedFunctionError: none compiles, and the captured graph is not the function that was asked for.
    """
    config, masked = ctx.env.config, any(not layer.reason for layer in ctx.facts.masked_layers)
    failed: dict[str, str] = {}
    compiled = None
    for kind, graph in graphs.items():
        if graph is None or compiled is not None:
            continue
        try:
            spell_as_functions(graph)
            with saving_what_is_marked():
                compiled = compile_with_inductor(graph, example_inputs, _inductor_options(graph, config), mode)
        except Exception as error:
            if config.strict or is_control_flow_exception(error):
                raise
            failed[kind] = f"{type(error).__name__}: {error}"
    if failed and compiled is None and masked:
        reasons = " ".join(dict.fromkeys(failed.values()))
        raise RequestedFunctionError(
            "the graph with masked layers (preserve_weight_mask) did not compile, and without it another function than "
            f"the one asked for would be trained. {reasons}"
        )
    if failed:
        kinds, instead = " and the ".join(failed), "dense" if "sparse" in failed else "as it was captured"
        reasons = " ".join(dict.fromkeys(failed.values()))
        warnings.warn(f"sparselora: the {kinds} graph did not compile, so it runs {instead}. {reasons}", stacklevel=2)
    return compiled


def _inductor_options(gm: fx.GraphModule, config: SparseLoRAConfig) -> Mapping[str, Any]:
    """Return the user's options for Inductor, after a default of ours for graphs with checkpoints.

    The partitioner puts each recomputation right before the backward that needs it. Inductor's reordering for peak
    memory tears them apart: what is recomputed of a dense block is then held through the whole backward (measured).
    """
    if not any("ac_graph_id" in node.meta for node in gm.graph.nodes):
        return config.inductor
    return {"reorder_for_peak_memory": False, **config.inductor}


def _watched(
    compiled: CompiledGraph, session: Session, report: GraphReport, config: SparseLoRAConfig, key: Hashable
) -> CompiledGraph:
    """Tell the session of every run of a compiled training graph."""
    runs = 0

    def run(*args: Any) -> Any:
        nonlocal runs
        session.note_training_forward(key)
        runs += 1
        if runs == 2:
            # All graphs of a training step have been compiled by now, whichever sessions they belong to.
            tell_when_all_is_compiled(session, report, config)
        return compiled(*args)

    return run
