"""FLOPs of the matrix products of one training step, counted from a graph.

A product of (n, a) with (a, b) counts 2nab FLOPs, and as many for each of its operands that gets a gradient. Causal
attention counts half of its scores, five products backward for two forward, as fused attention kernels execute it. Of
what is detached before it reaches an output, as DoRA's norm is, only the forward counts.

Sizes are those seen at tracing. Where they depend on data, the count is an expression over the numbers of output tokens
and of rows of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import sympy
from torch import Tensor, fx

from sparse_compile.graph.cost import LOSS, OUTPUT, TOKENS, association_costs, masked_layer_flops
from sparse_compile.graph.read import argument, op_name, tensor_value, value_of
from sparse_compile.graph.vocabulary import LINEAR, MATMULS
from sparse_compile.graph.walk import reach
from sparse_compile.torch_private.fake import is_unbacked, size_expression, size_hint, with_hints

__all__ = ["StepFlops", "step_flops"]


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of a training step, numbers or expressions over `cost.OUTPUT` and `cost.LOSS`.

    Attributes:
        total: of all matrix products.
        weights: of those with frozen weights.
    """

    total: sympy.Expr
    weights: sympy.Expr

    def at(self, counts: Mapping[sympy.Symbol, int]) -> tuple[float, float]:
        """Return total and weights for numbers of tokens."""
        return float(self.total.subs(counts)), float(self.weights.subs(counts))


def step_flops(graph: fx.Graph) -> StepFlops:
    """Count the FLOPs of a graph, captured or rewritten; every node must hold its value."""
    counter = _Counter(graph)
    total = weights = sympy.Integer(0)
    for node in graph.nodes:
        count = _COUNTS.get(op_name(node))
        if count is not None:
            flops, of_weights = count(counter, node)
            total, weights = total + flops, weights + of_weights
    return StepFlops(sympy.expand(total), sympy.expand(weights))


Flops = tuple[Any, Any]
"""All FLOPs of a node, and those of products with frozen weights."""

_NONE: Final[Flops] = (0, 0)


class _Counter:
    """Knows sizes and gradients of the nodes of one graph."""

    def __init__(self, graph: fx.Graph) -> None:
        self._differentiated = reach(
            [graph.output_node()], lambda node: [each for each in node.all_input_nodes if op_name(each) != "detach"]
        )
        self._roles: dict[sympy.Symbol, sympy.Symbol] = {}
        for node in graph.nodes:
            value = value_of(node)
            if op_name(node) == "split_tokens" and isinstance(value, tuple):
                self._remember(value[0], OUTPUT)
            elif op_name(node) == "loss_rows" and isinstance(value, Tensor):
                self._remember(value, LOSS)

    def _remember(self, rows: Tensor, role: sympy.Symbol) -> None:
        size = size_expression(rows.shape[0])
        if is_unbacked(size):
            self._roles[size] = role

    def size(self, size: Any) -> Any:
        """Return a size as a number, or as an expression over numbers of tokens where it depends on data."""
        if isinstance(size, int):
            return size
        expression = with_hints(size)
        known = expression.free_symbols <= self._roles.keys()
        return expression.xreplace(self._roles) if known else size_hint(size)

    def shape(self, node: Any) -> tuple[Any, ...]:
        """Return the shape of a tensor node, empty for anything else."""
        value = tensor_value(node)
        return () if value is None else tuple(self.size(size) for size in value.shape)

    def rows(self, node: Any) -> Any:
        """Return the number of rows of a tensor (..., width)."""
        return math.prod(self.shape(node)[:-1])

    def gradients(self, node: fx.Node, *operands: Any) -> int:
        """Return how many operands of a product get a gradient."""
        if node not in self._differentiated:
            return 0
        values = (tensor_value(operand) for operand in operands)
        return sum(value is not None and value.requires_grad for value in values)


def _product(counter: _Counter, node: fx.Node) -> Flops:
    operands = [operand for operand in node.all_input_nodes if len(counter.shape(operand)) > 1]
    if len(operands) < 2 or tensor_value(node) is None:
        return _NONE
    forward = 2 * math.prod(counter.shape(node)) * counter.shape(operands[0])[-1]
    flops = forward * (1 + counter.gradients(node, *operands))
    weight = tensor_value(argument(node, "weight")) if node.target is LINEAR else None
    return flops, flops if weight is not None and not weight.requires_grad else 0


def _attention(counter: _Counter, node: fx.Node) -> Flops:
    query, key = (counter.shape(argument(node, name)) for name in ("query", "key"))
    forward = 4 * math.prod(query) * key[-2] / (2 if query[-2] == key[-2] else 1)
    operands = (argument(node, name) for name in ("query", "key", "value"))
    return forward * (sympy.Rational(7, 2) if counter.gradients(node, *operands) else 1), 0


def _frozen_product(x_name: str) -> Callable[[_Counter, fx.Node], Flops]:
    def count(counter: _Counter, node: fx.Node) -> Flops:
        x = argument(node, x_name)
        flops = 2 * math.prod(counter.shape(node)) * counter.shape(x)[-1] * (1 + counter.gradients(node, x))
        return flops, flops

    return count


def _fused(counter: _Counter, node: fx.Node) -> Flops:
    (result,) = node.users  # its first output; the others are for the backward
    size = math.prod(counter.shape(result))
    xs, thins, factors = (argument(node, name) for name in ("xs", "thins", "factors"))
    inputs = [xs[read] for read in argument(node, "reads")]
    frozen = sum(2 * size * counter.shape(x)[-1] * (1 + counter.gradients(node, x)) for x in inputs)
    adapters = sum(
        2 * size * counter.shape(thin)[-1] * (1 + counter.gradients(node, thin, factor))
        for thin, factor in zip(thins, factors, strict=True)
    )
    return frozen + adapters, frozen


def _adapted(counter: _Counter, node: fx.Node) -> tuple[tuple[int, int, int], Any, bool]:
    """Return (in, out, rank), the number of tokens, and whether the input of an adapted layer gets a gradient."""
    x, weight, a = (argument(node, name) for name in ("x", "weight", "a"))
    out_features, in_features = counter.shape(weight)
    return (in_features, out_features, counter.shape(a)[0]), counter.rows(x), bool(counter.gradients(node, x))


def _merged(counter: _Counter, node: fx.Node) -> Flops:
    (in_features, out_features, rank), tokens, input_gradient = _adapted(counter, node)
    costs = association_costs(in_features, out_features, rank, input_gradient=input_gradient)
    total = costs[argument(node, "association")].subs(TOKENS, tokens)
    return total, 2 * tokens * in_features * out_features * (1 + input_gradient)


def _masked(counter: _Counter, node: fx.Node) -> Flops:
    sizes, tokens, input_gradient = _adapted(counter, node)
    exact = argument(node, "mask_gradient") == "exact"
    plain = association_costs(*sizes, input_gradient=input_gradient)["F1B1"]
    added = masked_layer_flops(*sizes, exact=exact, input_gradient=input_gradient)
    return (plain + added).subs(TOKENS, tokens), 2 * tokens * sizes[0] * sizes[1] * (1 + input_gradient)


def _dora_norm(counter: _Counter, node: fx.Node) -> Flops:
    return 2 * math.prod(counter.shape(argument(node, "weight"))) * counter.shape(argument(node, "a"))[0], 0


def _low_rank(counter: _Counter, node: fx.Node) -> Flops:
    x, a, b = (argument(node, name) for name in ("x", "a", "b"))
    return _predicted(counter, x, [a], [b]), 0


def _scores(counter: _Counter, node: fx.Node) -> Flops:
    x, a_factors, b_factors = (argument(node, name) for name in ("x", "a_factors", "b_factors"))
    return _predicted(counter, x, a_factors, b_factors), 0


def _predicted(counter: _Counter, x: fx.Node, a_factors: Sequence[fx.Node], b_factors: Sequence[fx.Node]) -> Any:
    factors = sum(math.prod(counter.shape(each)) for each in (*a_factors, *b_factors))
    return 2 * counter.rows(x) * factors


def _norms(counter: _Counter, node: fx.Node) -> Flops:
    """Count the thin product and its Gram matrix, from which the norms of the columns follow."""
    in_features, rank = counter.shape(argument(node, "a"))
    return 2 * counter.rows(argument(node, "x")) * rank * (in_features + rank), 0


def _mean(counter: _Counter, node: fx.Node) -> Flops:
    return 2 * math.prod(counter.shape(argument(node, "x"))), 0


_COUNTS: Final[Mapping[str, Callable[[_Counter, fx.Node], Flops]]] = {
    **dict.fromkeys((*MATMULS, "linear", "addmm"), _product),
    "scaled_dot_product_attention": _attention,
    "causal_attention": _attention,
    "frozen_linear": _frozen_product("x"),
    "gathered_linear": _frozen_product("x"),
    "gathered_input_linear": _frozen_product("h"),
    "fused_linear": _fused,
    "merged_linear": _merged,
    "masked_linear": _masked,
    "dora_norm": _dora_norm,
    "low_rank_product": _low_rank,
    "predicted_scores": _scores,
    "predicted_norms": _norms,
    "context_mean": _mean,
}
"""By name of a call, what counts it; every other call counts nothing."""
