"""From rewritten graphs to what Dynamo calls: the first graph that Inductor compiles, watched by its session."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from sparse_compile.compiler.notices import tell_when_all_is_compiled
from sparse_compile.compiler.outputs import CompiledGraph
from sparse_compile.compiler.report import GraphReport
from sparse_compile.graph.read import argument, tensor_of
from sparse_compile.kernels.channel_selection import prepare_count
from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.passes.context import PassContext
from sparse_compile.passes.protocol import RequestedFunctionError
from sparse_compile.torch_private.autograd import saving_what_is_marked
from sparse_compile.torch_private.dynamo import is_control_flow_exception
from sparse_compile.torch_private.inductor import compile_with_inductor
from sparse_compile.training.session import Session


def compile_as_it_is(
    gm: fx.GraphModule, example_inputs: Sequence[Any], config: SparseLoRAConfig, mode: str | None
) -> CompiledGraph:
    """Compile a graph with Inductor alone."""
    return compile_with_inductor(gm, example_inputs, config.inductor, mode)


def compile_first(
    graphs: Mapping[str, fx.GraphModule | None],
    example_inputs: Sequence[Any],
    ctx: PassContext,
    mode: str | None,
) -> tuple[str, CompiledGraph | None]:
    """Compile the first graph that compiles, with its name; None where there is none. One warning names the others.

    Raises:
        RequestedFunctionError: none compiles, and the captured graph is not the function that was asked for.
    """
    config, masked = ctx.env.config, any(not layer.reason for layer in ctx.facts.masked_layers)
    failed: dict[str, str] = {}
    compiled, chosen = None, ""
    for kind, graph in graphs.items():
        if graph is None or compiled is not None:
            continue
        try:
            _prepare_counts(graph)
            with saving_what_is_marked():
                compiled = compile_with_inductor(graph, example_inputs, _inductor_options(graph, config), mode)
            chosen = kind
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
    return chosen, compiled


def _prepare_counts(gm: fx.GraphModule) -> None:
    """Make the counters that choices of channels write to, before anything is captured in a CUDA graph."""
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.sparselora.top_channels.default):
        prepare_count(argument(node, "site"), tensor_of(node).device)


def _inductor_options(gm: fx.GraphModule, config: SparseLoRAConfig) -> Mapping[str, Any]:
    """Return the user's options for Inductor, after a default of ours for graphs with checkpoints.

    The partitioner puts each recomputation right before the backward that needs it. Inductor's reordering for peak
    memory tears them apart: what is recomputed of a dense block is then held through the whole backward (measured).
    """
    if not any("ac_graph_id" in node.meta for node in gm.graph.nodes):
        return config.inductor
    return {"reorder_for_peak_memory": False, **config.inductor}


def watched(
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
