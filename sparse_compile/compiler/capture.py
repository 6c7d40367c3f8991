"""Read a captured graph's surroundings: its parameters, autocast, roles and number of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from sparse_compile.compiler.model_part import ModelPart
from sparse_compile.graph.cost import ASSUMED_CONTEXT_SHARE
from sparse_compile.graph.read import hinted_shape, nodes_by_name, tensor_value
from sparse_compile.graph.sites import Parameter
from sparse_compile.kernels.roles.given import current_roles
from sparse_compile.kernels.roles.reference import output_mask
from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.passes.context import Environment, PassContext
from sparse_compile.torch_private.dynamo import module_path, source_of
from sparse_compile.torch_private.fake import is_fake
from sparse_compile.training import roles
from sparse_compile.training.token_capacity import announced_count


def capture_context(
    gm: fx.GraphModule, example_inputs: Sequence[object], config: SparseLoRAConfig, part: ModelPart | None = None
) -> PassContext:
    """Return a fresh context for the passes over a captured graph.

    Args:
        gm: the graph, as Dynamo hands it over.
        example_inputs: its inputs; parameters come as they are, other tensors may be stand-ins.
        config: the user's options.
        part: the part of a model that the graph was captured from; None for a whole model.
    """
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    parameters = {}
    for node, value in zip(placeholders, example_inputs, strict=True):
        path = module_path(source_of(node))
        stand_in = tensor_value(node)
        if isinstance(value, nn.Parameter) or isinstance(stand_in, nn.Parameter):
            trained = bool(getattr(value, "requires_grad", False))
            live = value if isinstance(value, Tensor) and not is_fake(value) else None
            if part is not None and part.path and path:
                path = (part.path, *path)
            parameters[node.name] = Parameter(node.name, ".".join(path) or node.name, trained, live)
    autocast = {
        device: torch.get_autocast_dtype(device) for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)
    }
    values = {
        node.name: value
        for node, value in zip(placeholders, example_inputs, strict=True)
        if isinstance(value, Tensor) and not is_fake(value)
    }
    stack = (0, 1) if part is None else (part.position, part.count)
    count = None if config.token_bucket is None else announced_count()
    return PassContext(Environment(config, parameters, values, roles.ROLES_GIVEN, autocast, stack, output_count=count))


def trained_parameters(gm: fx.GraphModule, example_inputs: Sequence[object], ctx: PassContext) -> list[Tensor]:
    """Return the live parameters of the graph that are trained."""
    names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    trained = {name for name, parameter in ctx.env.parameters.items() if parameter.trained}
    inputs = zip(names, example_inputs, strict=True)
    return [value for name, value in inputs if name in trained and isinstance(value, Tensor) and not is_fake(value)]


def is_whole_step(gm: fx.GraphModule, ctx: PassContext) -> bool:
    """Tell whether a graph holds a model from its inputs to its loss, so that no other graph can hold more sites.

    No activation enters it (floating-point tensors that are no parameters, of rank 3 or more), and the loss is in it.
    """
    for node in gm.graph.nodes:
        value = tensor_value(node)
        is_input = node.op == "placeholder" and node.name not in ctx.env.parameters
        if is_input and value is not None and value.is_floating_point() and value.dim() >= 3:
            return False
    return any("cross_entropy" in str(node.target) for node in gm.graph.nodes)


class TokenCounts(NamedTuple):
    """Numbers of tokens of a batch: by role, and those that the loss has a row for which is not ignored."""

    context: int
    output: int
    loss: int


def count_tokens(gm: fx.GraphModule, inputs: Sequence[object], ctx: PassContext) -> TokenCounts:
    """Count the tokens of a batch.

    Where the labels are no input of the graph, or only a stand-in is at hand, the share that the cost model assumes is
    taken of the tokens seen at tracing. The graph is one that the passes went over, in which sites are found by name.
    """
    mask = current_roles() if ctx.facts.roles and ctx.facts.roles.origin == "given" else None
    loss = None
    if ctx.facts.roles is not None and ctx.facts.roles.labels:
        names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
        values = dict(zip(names, inputs, strict=True))
        name, shift = ctx.facts.roles.labels[0]
        labels = values.get(name)
        if isinstance(labels, Tensor) and not is_fake(labels):
            mask = output_mask(labels, ctx.facts.roles.ignore_index, shift)
            loss = int((labels[:, shift:] != ctx.facts.roles.ignore_index).sum())
    if mask is not None:
        output = int(mask.sum())
        return TokenCounts(mask.numel() - output, output, output if loss is None else loss)
    if not ctx.facts.sites:
        return TokenCounts(0, 0, 0)
    total = math.prod(hinted_shape(nodes_by_name(gm.graph)[ctx.facts.sites[0].source])[:-1])
    context = round(ASSUMED_CONTEXT_SHARE * total)
    return TokenCounts(context, total - context, total - context)
