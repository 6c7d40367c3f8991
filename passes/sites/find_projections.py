"""Find the frozen linear layers and the LoRA branches beside them.

    %base   = linear(%x, W, b)                     W frozen
    %a      = linear(dropout(%x), A)               one branch; there may be several,
    %b      = linear(%a, B)                        with casts and a scale anywhere between
    %scaled = mul(%b, s)
    %output = add(%base, %scaled)

An adapter that is loaded and not trained has frozen factors, and is a branch all the same (`lora_branch`). Its products
are no layers of their own.

A weight-decomposed adapter (DoRA) is added as a term of another form: see `dora_term`.

The weight may be dequantised from one that is stored in 4 bits. A layer without a branch counts as well: SparseLoRA
prunes the MLP of a model whose adapters are on the attention alone. Whatever else is added to the base product is left
to the analyses that read the output.

Declines when: an adapter's factors are multiplied with each other or merged into the weight; the weight holds several
experts, is stored in 8 bits or in a tensor subclass, is no 2-D parameter of the graph, or is not at hand (the graph was
given stand-ins).
Leaves alone: a layer whose weight is trained.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import fx

from sparse_compile.graph.declined import Declined
from sparse_compile.graph.facts import Rejection
from sparse_compile.graph.read import (
    argument,
    calls_torch,
    nodes_by_name,
    op_name,
    shape_of,
    stored_matrix,
    strip_casts,
    tensor_of,
    tensor_value,
)
from sparse_compile.graph.sites import DoRATerm, LoRABranch, Parameter, Projection
from sparse_compile.graph.vocabulary import CASTS, LINEAR
from sparse_compile.graph.walk import reach
from sparse_compile.passes.context import PassContext
from sparse_compile.passes.protocol import Pass, PassOutcome
from sparse_compile.passes.read.dora_term import dora_term
from sparse_compile.passes.read.four_bit import calls_bitsandbytes
from sparse_compile.passes.read.lora_branch import is_sum, match_branch, strip_scale
from sparse_compile.passes.read.projections import matrix_operand

EXPERTS = (
    "its weight holds several experts: tokens are sorted by expert before they are multiplied, so that their places no "
    "longer tell their roles. Routed experts stay dense"
)
EIGHT_BITS = (
    "its weight is stored in 8 bits and dequantised within the layer, where channels cannot be picked: it stays dense. "
    "Load the model in 4 bits (`load_in_4bit`, for example NF4) or in 16 bits to have it sparse"
)
WRAPPED = (
    "its weight is a tensor of a class of its own ({}, as torchao's quantised weights are), which this backend's "
    "operators cannot read: it stays dense. Load the model in 4 bits with bitsandbytes or in 16 bits to have it sparse"
)
MULTIPLIED_FACTORS = (
    "the factors of its adapter are multiplied with each other, x @ (A @ B), which forms a matrix as large as the "
    "weight: it is not matched as an adapter. Write (x @ A) @ B"
)
MERGED = (
    "its weight is merged with an adapter in the graph, x @ (W + A @ B): it is no frozen layer with an adapter beside "
    "it, and stays dense. Write x @ W + (x @ A) @ B"
)
DEQUANTISED_AGAIN = (
    "a DoRA adapter with dropout dequantises the 4-bit weight to another dtype than the layer computes in, so it is "
    "not matched. Set bnb_4bit_compute_dtype to the dtype that the model is loaded in, or lora_dropout=0.0"
)
_ADAPTER_WRAPPERS = {"base_layer", "weight", "parametrizations", "original"}


class FindProjections(Pass):
    """Record every frozen linear layer with its LoRA branches in `ctx.facts.projections`."""

    requires = ("canonical",)
    ensures = ("projections",)
    analysis = True

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassOutcome:
        """Read the graph."""
        projections: dict[str, Projection] = {}
        rejections: list[Rejection] = []
        taken: set[str] = set()
        for node in gm.graph.nodes:
            if node.target is not LINEAR or node.name in taken:
                continue
            try:
                found = _projection(node, ctx)
            except Declined as declined:
                rejections.append(declined.by(self.name))
                continue
            if found is not None:
                projections[node.name] = found
                taken.update(found.products)
        rejections += _formed_in_full(gm.graph, projections, ctx)
        projections = _without_factors(projections, gm.graph, ctx)
        rejections += [*_experts(gm.graph, ctx), *_in_8_bits(gm.graph, ctx)]
        ctx.facts = replace(ctx.facts, projections=projections)
        branches = sum(len(projection.adapters) for projection in projections.values())
        return PassOutcome(False, {"projections": len(projections), "branches": branches}, tuple(rejections))


def _without_factors(projections: dict[str, Projection], graph: fx.Graph, ctx: PassContext) -> dict[str, Projection]:
    """Return the layers without the products of frozen adapters.

    A product with A may stand before the layer that it belongs to. DoRA's norm applies the factors to an identity
    matrix, which is no layer either.
    """
    branches = [branch for projection in projections.values() for branch in projection.adapters]
    products = {name for branch in branches for name in (branch.a, branch.b)}
    factors = {name for branch in branches for name in branch.factors}
    inputs = (node for node in graph.nodes if node.op == "placeholder" and node.name not in ctx.env.parameters)
    of_tokens = {node.name for node in reach(inputs, lambda node: node.users)}
    return {
        name: projection
        for name, projection in projections.items()
        if name not in products and (projection.weight not in factors or name in of_tokens)
    }


def _formed_in_full(graph: fx.Graph, projections: dict[str, Projection], ctx: PassContext) -> list[Rejection]:
    """Name the layers whose adapter is multiplied out, or merged into the weight, before it meets the tokens."""
    found = []
    nodes = nodes_by_name(graph)
    for projection in projections.values():
        for user in nodes[projection.output].users:
            others = [each for each in user.all_input_nodes if each is not nodes[projection.output]]
            weight = _computed_weight(strip_scale(others[0])) if is_sum(user) and len(others) == 1 else None
            if weight is not None and any(each.trained for each in _parameters_in(weight, ctx)):
                found.append(Rejection("find_projections", projection.name, MULTIPLIED_FACTORS))
    for node in graph.nodes:
        weight = _computed_weight(node)
        parts = _parameters_in(weight, ctx) if weight is not None else []
        frozen = [each for each in parts if not each.trained and tensor_of(nodes[each.node]).dim() == 2]
        if len(frozen) == 1 and len(parts) == 3 and all(each.trained for each in parts if each is not frozen[0]):
            found.append(Rejection("find_projections", _module_name(frozen[0].path), MERGED))
    return found


def _computed_weight(node: fx.Node) -> fx.Node | None:
    """Return the matrix that a node multiplies with, where it is computed in the graph."""
    weight = matrix_operand(node) if calls_torch(node) else None
    if not isinstance(weight, fx.Node) or stored_matrix(weight)[0].op == "placeholder":
        return None
    return weight if len(shape_of(weight)) == 2 else None


def _parameters_in(weight: fx.Node, ctx: PassContext) -> list[Parameter]:
    """Return the parameters that a matrix is computed from; none where something else has a part in it."""
    leaves = [each for each in reach([weight], lambda node: node.all_input_nodes) if each.op == "placeholder"]
    parameters = [ctx.env.parameters[each.name] for each in leaves if each.name in ctx.env.parameters]
    return parameters if len(parameters) == len(leaves) else []


@dataclass
class _Chain:
    """The additions behind a base product, as far as they were followed."""

    output: fx.Node
    branches: list[LoRABranch] = field(default_factory=list)
    dora: list[DoRATerm] = field(default_factory=list)


def _projection(node: fx.Node, ctx: PassContext) -> Projection | None:
    """Return the frozen layer whose base product a node is, or None where its weight is trained."""
    source, operand = argument(node, "input"), argument(node, "weight")
    bias = argument(node, "bias")
    transposed = False
    weight = strip_casts(operand)
    if op_name(weight) == "t":
        transposed, weight = True, strip_casts(argument(weight, "input"))
    parameter = ctx.env.parameters.get(weight.name)
    quantized = ctx.facts.quantized_weights.get(weight.name)
    value = tensor_value(operand)
    if (parameter is None and quantized is None) or value is None or value.dim() != 2:
        if calls_bitsandbytes(weight, "dequantize_4bit"):
            raise Declined(node, DEQUANTISED_AGAIN)
        raise Declined(node, "its weight is computed in the graph, not a parameter")
    if parameter is not None and parameter.trained:
        return None  # an adapter's factor, or a layer that is trained in full: nothing frozen to prune
    if parameter is not None and parameter.value is None:
        raise Declined(parameter.path, "its weight is not at hand while compiling")
    path = parameter.path if parameter is not None else ctx.facts.quantized_weights[weight.name].path
    if parameter is not None and parameter.is_wrapper:
        raise Declined(_module_name(path), WRAPPED.format(type(parameter.value).__name__))
    chain = _branches(node, source, ctx)
    out_features, in_features = (int(size) for size in value.shape)
    return Projection(
        name=_module_name(path),
        base=node.name,
        source=source.name,
        weight=weight.name,
        transposed=transposed,
        bias=bias.name if isinstance(bias, fx.Node) else None,
        branches=tuple(chain.branches),
        output=chain.output.name,
        in_features=in_features,
        out_features=out_features,
        dora=tuple(chain.dora),
    )


def _in_8_bits(graph: fx.Graph, ctx: PassContext) -> list[Rejection]:
    """Name the frozen matrices whose elements are bytes: bitsandbytes' int8, and the fp8 of others."""
    found = []
    for node in graph.nodes:
        parameter, value = ctx.env.parameters.get(node.name), tensor_value(node)
        if parameter is None or parameter.trained or value is None or value.dim() != 2:
            continue
        # What is packed more tightly is held in unsigned bytes.
        if value.dtype.itemsize == 1 and value.dtype not in (torch.uint8, torch.bool):
            found.append(Rejection("find_projections", _module_name(parameter.path), EIGHT_BITS))
    return found


def _experts(graph: fx.Graph, ctx: PassContext) -> list[Rejection]:
    """Name the frozen weights that hold a matrix for each of several experts."""
    found = []
    for node in graph.nodes:
        parameter, value = ctx.env.parameters.get(node.name), tensor_value(node)
        stacked = parameter is not None and not parameter.trained and value is not None and value.dim() == 3
        # A convolution's weight has three dimensions too.
        if stacked and parameter is not None and not any("conv" in op_name(user) for user in node.users):
            found.append(Rejection("find_projections", _module_name(parameter.path), EXPERTS))
    return found


def _module_name(path: str) -> str:
    parts = path.split(".")
    while len(parts) > 1 and parts[-1] in _ADAPTER_WRAPPERS:
        parts.pop()
    return ".".join(parts)


def _branches(base: fx.Node, source: fx.Node, ctx: PassContext) -> _Chain:
    """Follow the additions behind a base product for as long as adapters of the same input are added."""
    chain = _Chain(base)
    while True:
        branch = _added_branch(chain.output, source, ctx)
        if branch is not None:
            chain.output, found = branch
            chain.branches.append(found)
            continue
        term = dora_term(chain.output, base, source, ctx)
        if term is None:
            return chain
        chain.output, decomposed = term
        chain.dora.append(decomposed)


def _added_branch(running: fx.Node, source: fx.Node, ctx: PassContext) -> tuple[fx.Node, LoRABranch] | None:
    """Return the one reader of a running sum, an addition, and the LoRA branch that it adds."""
    # PEFT casts the sum back to the base dtype between two adapters.
    step = running
    while len(step.users) == 1 and op_name(user := next(iter(step.users))) in CASTS and calls_torch(user):
        step = user
    addition = next(iter(step.users)) if len(step.users) == 1 else None
    if addition is None or not is_sum(addition):
        return None
    others = [arg for arg in addition.args if arg is not step]
    branch = match_branch(others[0], source, ctx) if len(others) == 1 and isinstance(others[0], fx.Node) else None
    return None if branch is None else (addition, branch)
