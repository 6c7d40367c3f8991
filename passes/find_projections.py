"""Find the frozen linear layers and the LoRA branches beside them.

    %base   = linear(%x, W, b)                     W frozen
    %a      = linear(dropout(%x), A)               A trained          one branch; there may be several,
    %b      = linear(%a, B)                        B trained          with casts and a scale anywhere between
    %scaled = mul(%b, s)
    %output = add(%base, %scaled)

A projection without a branch is a projection all the same: SparseLoRA prunes the MLP of a model whose adapters are on
the attention alone. Anything else that is added to the base product is left to the analyses that read the output.

Declines when: the weight is trained, is no 2-D parameter of the graph, or is not at hand (the graph was given
stand-ins).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from sparse_compile.graph import CASTS, LINEAR, argument, calls_torch, op_name, tensor_value
from sparse_compile.ir import LoRABranch, Projection, Rejection
from sparse_compile.passes.base import Numerics, PassContext, PassOutcome

_ADDS = {"add", "iadd", "add_", "__add__", "__iadd__"}
_ADAPTER_WRAPPERS = {"base_layer", "weight", "parametrizations", "original"}


@dataclass(frozen=True)
class FindProjections:
    """Record every frozen linear layer with its LoRA branches in `ctx.projections`."""

    name: str = "find_projections"
    requires: tuple[str, ...] = ("canonical",)
    ensures: tuple[str, ...] = ("projections",)
    numerics: Numerics = Numerics.EXACT
    analysis: bool = True
    optimises: bool = False

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassOutcome:
        """Read the graph."""
        ctx.projections = {}
        rejections: list[Rejection] = []
        for node in gm.graph.nodes:
            if node.target is not LINEAR:
                continue
            found = _projection(node, ctx)
            if isinstance(found, Projection):
                ctx.projections[node.name] = found
            elif found is not None:
                rejections.append(found)
        branches = sum(len(projection.branches) for projection in ctx.projections.values())
        return PassOutcome(False, {"projections": len(ctx.projections), "branches": branches}, tuple(rejections))


def strip_casts(node: fx.Node) -> fx.Node:
    """Follow dtype casts back to what they cast."""
    while calls_torch(node) and op_name(node) in CASTS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _projection(node: fx.Node, ctx: PassContext) -> Projection | Rejection | None:
    source, operand = argument(node, 0, "input"), argument(node, 1, "weight")
    bias = argument(node, 2, "bias")
    transposed = False
    weight = strip_casts(operand)
    if op_name(weight) == "t" and isinstance(weight.args[0], fx.Node):
        transposed, weight = True, strip_casts(weight.args[0])
    parameter = ctx.parameters.get(weight.name)
    value = tensor_value(operand)
    if parameter is None or value is None or value.dim() != 2:
        return Rejection("find_projections", node.name, "its weight is computed in the graph, not a parameter")
    if parameter.trained:
        return None  # an adapter's factor, or a layer that is trained in full: nothing frozen to prune
    if parameter.value is None:
        return Rejection("find_projections", parameter.path, "its weight is not at hand while compiling")
    output, branches = _branches(node, source, ctx)
    out_features, in_features = (int(size) for size in value.shape)
    return Projection(
        name=_module_name(parameter.path),
        base=node.name,
        source=source.name,
        weight=weight.name,
        transposed=transposed,
        bias=bias.name if isinstance(bias, fx.Node) else None,
        branches=branches,
        output=output.name,
        in_features=in_features,
        out_features=out_features,
    )


def _module_name(path: str) -> str:
    parts = path.split(".")
    while len(parts) > 1 and parts[-1] in _ADAPTER_WRAPPERS:
        parts.pop()
    return ".".join(parts)


def _branches(base: fx.Node, source: fx.Node, ctx: PassContext) -> tuple[fx.Node, tuple[LoRABranch, ...]]:
    """Follow the additions behind a base product for as long as LoRA branches of the same input are added."""
    output = base
    branches: list[LoRABranch] = []
    while True:
        # PEFT casts the sum back to the base dtype between two adapters.
        step = output
        while len(step.users) == 1 and op_name(user := next(iter(step.users))) in CASTS and calls_torch(user):
            step = user
        addition = next(iter(step.users)) if len(step.users) == 1 else None
        if addition is None or op_name(addition) not in _ADDS or addition.kwargs.get("alpha", 1) != 1:
            return output, tuple(branches)
        others = [arg for arg in addition.args if arg is not step]
        branch = _branch(others[0], source, ctx) if len(others) == 1 and isinstance(others[0], fx.Node) else None
        if branch is None:
            return output, tuple(branches)
        output = addition
        branches.append(branch)


def _branch(output: fx.Node, source: fx.Node, ctx: PassContext) -> LoRABranch | None:
    b = _strip_scale(output)
    if not _is_trained_linear(b, ctx):
        return None
    a = _strip_scale(argument(b, 0, "input"))
    if not _is_trained_linear(a, ctx):
        return None
    x, dropout = strip_casts(argument(a, 0, "input")), None
    shared = strip_casts(source)
    # A dropout that the base product reads as well belongs to the block, not to the adapter.
    if x is not shared and calls_torch(x) and op_name(x) == "dropout":
        dropout, x = x.name, strip_casts(x.args[0])  # type: ignore[arg-type]
    if x is not shared:
        return None
    return LoRABranch(a=a.name, b=b.name, output=output.name, dropout=dropout)


def _strip_scale(node: fx.Node) -> fx.Node:
    """Follow casts and products with a number back to what they scale."""
    while True:
        node = strip_casts(node)
        if not (calls_torch(node) and op_name(node) in ("mul", "__mul__", "imul")):
            return node
        tensors = [arg for arg in node.args if isinstance(arg, fx.Node) and tensor_value(arg) is not None]
        if len(tensors) != 1:
            return node
        node = tensors[0]


def _is_trained_linear(node: fx.Node, ctx: PassContext) -> bool:
    if node.target is not LINEAR:
        return False
    weight = strip_casts(argument(node, 1, "weight"))
    if op_name(weight) == "t":
        weight = strip_casts(weight.args[0])  # type: ignore[arg-type]
    parameter = ctx.parameters.get(weight.name)
    return parameter is not None and parameter.trained
