"""Bring every spelling of a linear layer to one form, and drop what does nothing.

Cases handled, each with the graph before and after:

    matmul(x, W.t()), x @ W.T, x.matmul(W.t()), mm(x, W.t())    ->  linear(x, W, None)
    matmul(x, V), x @ V       (V a parameter (in, out))         ->  linear(x, V.t(), None)
    addmm(b, x, W.t()), addmm(b, x, V)  (Conv1D)                ->  linear(x, W, b), linear(x, V.t(), b)
    einsum("...i,ri->...r", x, W), einsum("bsi,ir->bsr", x, V)  ->  linear(x, W, None), linear(x, V.t(), None)
    linear(x.view(B*S, in), W, b).view(B, S, out)               ->  linear(x, W, b)
    linear(x, W, b) / n                                         ->  linear(x, W, b) * (1 / n)
    add(y, linear(x, W, b), alpha=s)                            ->  add(y, linear(x, W, b) * s)
    x.to(dtype) where x already has it                          ->  x
    dropout(x, p, training=False), dropout(x, 0.0)              ->  x

Legal because: each pair computes the same function; only the rounding of a fused bias or of a scale may differ.
Declines when: an addmm has alpha or beta other than 1, or adds what is no bias vector.
Leaves alone: a product whose second operand is no parameter. A captured graph that no later pass rewrites is compiled
as it was captured: the canonical copy is dropped.
"""

from __future__ import annotations

import operator
import re

from torch import fx

from sparse_compile.graph.declined import Declined
from sparse_compile.graph.facts import Rejection
from sparse_compile.graph.read import argument, calls_torch, op_name, shape_of, strip_transposes, tensor_value
from sparse_compile.graph.rewrite import Rewriter, forward_to, take_over
from sparse_compile.graph.vocabulary import CASTS, LINEAR, MATMULS, SUMS
from sparse_compile.passes.context import PassContext
from sparse_compile.passes.protocol import Pass, PassOutcome
from sparse_compile.passes.read.lora_branch import strip_scale

_DIVISIONS = {"div", "truediv", "__truediv__", "divide", "true_divide"}


class CanonicalizeLinears(Pass):
    """Rewrite every spelling of a linear layer with a parameter to `linear(x, W, b)`."""

    ensures = ("canonical",)
    # Exposed products are written in the one spelling already.
    after = ("expose_4bit_weights",)

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassOutcome:
        """Rewrite the graph in place."""
        rewriter = Rewriter(gm, self.name)
        stats = {"linears": 0, "scales": 0, "casts": 0, "dropouts": 0}
        rejections: list[Rejection] = []
        for node in list(gm.graph.nodes):
            if not calls_torch(node):
                continue
            if op_name(node) in CASTS and _is_noop_cast(node):
                forward_to(node, argument(node, "input"))
                stats["casts"] += 1
            elif op_name(node) == "dropout" and _is_dead_dropout(node):
                forward_to(node, argument(node, "input"))
                stats["dropouts"] += 1
            elif _as_scaled(node, rewriter):
                stats["scales"] += 1
            else:
                try:
                    stats["linears"] += _as_linear(node, ctx, rewriter)
                except Declined as declined:
                    rejections.append(declined.by(self.name))
        return PassOutcome(any(stats.values()), stats, tuple(rejections))


def _is_noop_cast(node: fx.Node) -> bool:
    before, after = tensor_value(argument(node, "input")), tensor_value(node)
    if before is None or after is None or node.kwargs.get("copy") or node.kwargs.get("memory_format") is not None:
        return False
    # `to(dtype)` of the same dtype returns its input; a fifth positional argument would be `copy`.
    return before.dtype == after.dtype and before.device == after.device and len(node.args) <= 3


def _is_dead_dropout(node: fx.Node) -> bool:
    return argument(node, "training", True) is False or argument(node, "p", 0.5) == 0.0


def _as_scaled(node: fx.Node, rewriter: Rewriter) -> bool:
    """Rewrite a linear layer's product that is divided by a number, or scaled as it is added; tell whether it is."""
    if len(node.args) != 2:
        return False
    first, second = node.args
    if op_name(node) in _DIVISIONS and not node.kwargs and isinstance(first, fx.Node):
        if not isinstance(second, int | float) or second == 0 or strip_scale(first).target is not LINEAR:
            return False
        with rewriter.before(node):
            take_over(node, rewriter.call(operator.mul, first, 1 / second))
        return True
    if op_name(node) in SUMS and set(node.kwargs) == {"alpha"} and isinstance(second, fx.Node):
        number = node.kwargs["alpha"]
        if not isinstance(number, int | float) or number == 1 or strip_scale(second).target is not LINEAR:
            return False
        with rewriter.before(node):
            scaled = rewriter.call(operator.mul, second, number)
        node.args, node.kwargs = (first, scaled), {}
        rewriter.reevaluate(node)
        return True
    return False


def _as_linear(node: fx.Node, ctx: PassContext, rewriter: Rewriter) -> bool:
    """Rewrite `node` where it is a product with a parameter; tell whether it is.

    Raises:
        Declined: it is one, and no linear layer.
    """
    if op_name(node) in MATMULS:
        x, weight, bias = argument(node, "input"), argument(node, "other"), None
    elif op_name(node) == "addmm":
        bias, x, weight = (argument(node, name) for name in ("input", "mat1", "mat2"))
    elif op_name(node) == "einsum":
        return _einsum_as_linear(node, ctx, rewriter)
    else:
        return False
    x_value, weight_value = tensor_value(x), tensor_value(weight)
    if x_value is None or weight_value is None or weight_value.dim() != 2 or x_value.dim() < 2:
        return False
    parameter, transposes = strip_transposes(weight)
    if parameter.name not in ctx.env.parameters:
        return False
    if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1:
        raise Declined(node, "addmm with alpha or beta other than 1")
    bias_value = tensor_value(bias)
    if bias is not None and (bias_value is None or bias_value.dim() != 1):
        raise Declined(node, "addmm with an input that is not a bias vector")
    with rewriter.before(node):
        # `weight` is (in, out); `linear` wants (out, in).
        operand = parameter if transposes % 2 else rewriter.method("t", parameter)
        linear = rewriter.call(LINEAR, x, operand, bias)
    take_over(node, linear)
    _drop_flattening(linear, rewriter)
    return True


def _einsum_as_linear(node: fx.Node, ctx: PassContext, rewriter: Rewriter) -> bool:
    """Rewrite an `einsum` that contracts the last dimension of a tensor with a parameter; tell whether it is one."""
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    form = re.fullmatch(r"(\.{3}\w*|\w+)(\w),(\w)(\w)->(\.{3}\w*|\w+)(\w)", str(equation).replace(" ", ""))
    if form is None or len(operands) != 2 or node.kwargs:
        return False
    rows, width, first, second, kept, out = form.groups()
    x, weight = operands
    x_value, weight_value = tensor_value(x), tensor_value(weight)
    letters = rows.removeprefix("...") + width + out
    if rows != kept or {first, second} != {width, out} or len(set(letters)) < len(letters):
        return False
    if x_value is None or weight_value is None or x_value.dim() < 2 or not isinstance(weight, fx.Node):
        return False
    parameter, transposes = strip_transposes(weight)
    if parameter.name not in ctx.env.parameters:
        return False
    with rewriter.before(node):
        stored_as_in_out = (first == width) != (transposes % 2 == 1)
        operand = rewriter.method("t", parameter) if stored_as_in_out else parameter
        take_over(node, rewriter.call(LINEAR, x, operand, None))
    return True


def _drop_flattening(linear: fx.Node, rewriter: Rewriter) -> None:
    """Have a product read the tensor that was flattened for it, where its result is given back the shape."""
    flat = argument(linear, "input")
    if not isinstance(flat, fx.Node) or op_name(flat) not in ("view", "reshape"):
        return
    x = argument(flat, "input")
    x_value, value = tensor_value(x), tensor_value(linear)
    if x_value is None or value is None or x_value.dim() < 3 or x_value.shape[-1:] != shape_of(flat)[-1:]:
        return
    # Sizes are compared as they are written: comparing symbols would add guards.
    wanted = [*map(str, x_value.shape[:-1]), str(value.shape[-1])]
    views = list(linear.users)
    if not views or any(op_name(v) not in ("view", "reshape") or [*map(str, shape_of(v))] != wanted for v in views):
        return
    with rewriter.before(linear):
        whole = rewriter.call(LINEAR, x, *linear.args[1:])
    for view in views:
        forward_to(view, whole)
    rewriter.graph.erase_node(linear)
    if not flat.users:
        rewriter.graph.erase_node(flat)
