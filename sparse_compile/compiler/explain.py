"""Say what the backend would do to a model, without running or training it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

import sparse_compile.kernels  # noqa: F401  (registers torch.ops.sparselora)
from sparse_compile.compiler.capture import capture_context, count_tokens, trained_parameters
from sparse_compile.compiler.graph_texts import GraphTexts
from sparse_compile.compiler.model_part import part_of
from sparse_compile.compiler.peft_support import make_dora_traceable
from sparse_compile.compiler.report import GraphReport, Report, graph_report, report_of
from sparse_compile.compiler.runner import run_pipeline
from sparse_compile.graph.read import hinted_shape, tensor_value, value_of
from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.torch_private.dynamo import compile_id, without_recompile_limit
from sparse_compile.torch_private.fake import size_hint
from sparse_compile.torch_private.modules import backend_name, backend_options, uncompiled
from sparse_compile.training.session import known_config
from sparse_compile.training.sharded import any_in_parts

_UNTRAINED = "no parameter that is trained takes part in it. Add an adapter, for example with peft.get_peft_model"
_IN_PARTS = "its parameters are DTensors, of which each rank holds a part (tensor parallel)"


def explain(
    model: nn.Module | Callable[..., Any],
    *args: Any,
    config: SparseLoRAConfig | Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Report:
    """Trace one training step and report every site, what was declined, and the FLOPs before and after each pass.

    Nothing is computed and nothing is trained: each captured graph is answered by zeros of the right shapes. A model
    that was compiled before stays as it was.

    Args:
        model: the model, or a function.
        *args: what a training step passes to it.
        config: the options; None for those that the model (or its parts) was compiled with, or else the defaults. The
            report says which. The schedule plays no part: a sparse step is reported.
        **kwargs: what a training step passes to it, `labels` among them.

    Returns:
        The report, one entry for each graph that TorchDynamo captured.

    Raises:
        ValueError: an invalid option.
    """
    options, origin = _options_of(model, config)
    graphs: list[GraphReport] = []
    texts: list[GraphTexts] = []
    untrained: list[str] = []
    make_dora_traceable()

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        part = part_of(gm)
        ctx = capture_context(gm, example_inputs, options, part)
        in_parts = any_in_parts(example_inputs)
        trains = torch.is_grad_enabled() and bool(trained_parameters(gm, example_inputs, ctx))
        if in_parts or not trains:
            untrained.append(_IN_PARTS if in_parts else _UNTRAINED)
        text = GraphTexts()
        result = run_pipeline(gm, ctx, text) if trains and not in_parts else None
        seen = False

        def stand_in(*inputs: Any) -> list[Any]:
            nonlocal seen
            if result is not None and not seen:
                seen = True
                tokens = count_tokens(result.canonical, inputs, ctx)
                path = "" if part is None else part.path
                graphs.append(graph_report(result, ctx, compile_id(gm), tokens, path))
                for name, source in ctx.results.kernel_sources.items():
                    text.kernel(name, source)
                texts.append(text)
            return [_zeros(node) for node in _outputs(gm)]

        return stand_in

    with uncompiled(model), torch.enable_grad(), without_recompile_limit():
        torch.compile(model, backend=backend)(*args, **kwargs)
    return report_of(graphs, texts, options, origin, *untrained[:1])


def _options_of(
    model: nn.Module | Callable[..., Any], config: SparseLoRAConfig | Mapping[str, Any] | None
) -> tuple[SparseLoRAConfig, str]:
    """Return the options to explain a model with, and where they come from."""
    if isinstance(config, SparseLoRAConfig):
        return config, "config"
    if config is not None:
        return SparseLoRAConfig.from_options(config), "config"
    if (own := _compiled_with(model)) is not None:
        return own, "the compiled model"
    if isinstance(model, nn.Module):
        parts = [found for part in model.modules() if (found := _compiled_with(part)) is not None]
        if parts:
            alike = all(part == parts[0] for part in parts)
            return parts[0], "the compiled parts" if alike else "the first compiled part (others have other options)"
        known = known_config([parameter for parameter in model.parameters() if parameter.requires_grad])
        if known is not None:
            return known, "the session of the model"
    return SparseLoRAConfig(), "the defaults"


def _compiled_with(model: nn.Module | Callable[..., Any]) -> SparseLoRAConfig | None:
    """Return the options of what was compiled with this backend; None for anything else."""
    given = backend_options(model) if backend_name(model) == "sparselora" else None
    return None if given is None else SparseLoRAConfig.from_options(given)


def _outputs(gm: fx.GraphModule) -> Sequence[Any]:
    output = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
    values = output.args[0]
    return values if isinstance(values, tuple | list) else (values,)


def _zeros(node: Any) -> Any:
    value = tensor_value(node)
    if value is None:
        return size_hint(value_of(node)) if isinstance(node, fx.Node) else node
    return torch.zeros(hinted_shape(node), dtype=value.dtype, device=value.device, requires_grad=value.requires_grad)
