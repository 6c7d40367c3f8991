"""FLOPs of the matrix products of one training step, counted from a graph.

A product of (n, a) with (a, b) counts 2nab FLOPs, and as many for each of its operands that gets a gradient. Attention
over its own sequence counts half of its scores, for a decoder masks the others, and five products backward for two
forward, as fused kernels execute it. Of what is detached before it reaches an output, as DoRA's norm is, only the
forward counts.

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
from sparse_compile.graph.read import argument, calls_torch, op_name, tensor_of, tensor_value, value_of
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
        count = _COUNTS.get(_known_name(node))
        if count is not None:
            flops, of_weights = count(counter, node)
            total, weights = total + flops, weights + of_weights
    return StepFlops(sympy.expand(total), sympy.expand(weights))


def _known_name(node: fx.Node) -> str:
    """Return the name of a call of PyTorch or of an op of ours; empty for any other, whatever its name."""
    return op_name(node) if calls_torch(node) else ""


Flops = tuple[Any, Any]
"""All FLOPs of a node, and those of products with frozen weights."""

_NONE: Final[Flops] = (0, 0)


class _Counter:
    """Knows sizes and gradients of the nodes of one graph."""

    def __init__(self, graph: fx.Graph) -> None:
        self._differentiated = reach(
            [graph.output_node()], lambda node: [each for each in node.all_input_nodes if op_name(each) != "detach"]
        )
        self._roles: dict[sympy.Symbol, sympy.Expr] = {}
        for node in graph.nodes:
            value = value_of(node)
            if _known_name(node) == "split_tokens" and isinstance(value, tuple):
                self._remember(value[0], OUTPUT)
            elif _known_name(node) == "query_slots" and isinstance(value, Tensor):
                # Of all sequences together there are as many queries as output tokens, and some spare slots.
                self._remember(value.mT, OUTPUT / self.size(value.shape[0]))
            elif _known_name(node) == "loss_rows" and isinstance(value, Tensor):
                self._remember(value, LOSS)

    def _remember(self, rows: Tensor, role: sympy.Expr) -> None:
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

    def differentiates(self, node: fx.Node) -> bool:
        """Tell whether a gradient may reach a node."""
        return node in self._differentiated

    def gradients(self, node: fx.Node, *operands: Any) -> int:
        """Return how many operands of a product get a gradient."""
        if not self.differentiates(node):
            return 0
        values = (tensor_value(operand) for operand in operands)
        return sum(value is not None and value.requires_grad for value in values)


def _product(counter: _Counter, node: fx.Node) -> Flops:
    names = {"linear": ("input", "weight"), "addmm": ("mat1", "mat2")}.get(op_name(node), ("input", "other"))
    x, other = (argument(node, name) for name in names)
    if not counter.shape(x) or not counter.shape(other):
        return _NONE
    forward = 2 * math.prod(counter.shape(node)) * counter.shape(x)[-1]
    flops = forward * (1 + counter.gradients(node, x, other))
    is_frozen = node.target is LINEAR and not tensor_of(other).requires_grad
    return flops, flops if is_frozen else 0


def _attention(counter: _Counter, node: fx.Node) -> Flops:
    operands = [argument(node, name) for name in ("query", "key", "value")]
    query, key, value = (counter.shape(operand) for operand in operands)
    scores = math.prod(query[:-1]) * key[-2]
    forward = sympy.Rational(2, 2 if query[-2] == key[-2] else 1) * scores * (query[-1] + value[-1])
    return forward * (sympy.Rational(7, 2) if counter.gradients(node, *operands) else 1), 0


def _queried_attention(counter: _Counter, node: fx.Node) -> Flops:
    operands = [argument(node, name) for name in ("query", "key", "value")]
    query, key, value = (counter.shape(operand) for operand in operands)
    # Queries at the end of a sequence read nearly all keys: no half is left out.
    forward = math.prod(counter.shape(argument(node, "slots"))) * query[1] * key[-2] * (query[-1] + value[-1]) * 2
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


_Costs = Callable[[fx.Node, tuple[int, int, int], bool], sympy.Expr]


def _adapted(costs: _Costs) -> Callable[[_Counter, fx.Node], Flops]:
    """Return what counts a layer together with its adapter.

    Args:
        costs: returns, for (in, out, rank) and whether the input gets a gradient, the FLOPs of a step over `TOKENS`.
    """

    def count(counter: _Counter, node: fx.Node) -> Flops:
        x, weight, a = (argument(node, name) for name in ("x", "weight", "a"))
        out_features, in_features = counter.shape(weight)
        rank, tokens = counter.shape(a)[0], counter.rows(x)
        product = 2 * tokens * in_features * out_features
        if not counter.differentiates(node):
            return product + 2 * tokens * rank * (in_features + out_features), product
        # As the pass asked that chose the order of the products.
        input_gradient = tensor_of(x).requires_grad
        total = costs(node, (in_features, out_features, rank), input_gradient).subs(TOKENS, tokens)
        return total, product * (1 + input_gradient)

    return count


def _merged(node: fx.Node, sizes: tuple[int, int, int], input_gradient: bool) -> sympy.Expr:
    return association_costs(*sizes, input_gradient=input_gradient)[argument(node, "association")]


def _masked(node: fx.Node, sizes: tuple[int, int, int], input_gradient: bool) -> sympy.Expr:
    exact = argument(node, "mask_gradient") == "exact"
    plain = association_costs(*sizes, input_gradient=input_gradient)["F1B1"]
    return plain + masked_layer_flops(*sizes, exact=exact, input_gradient=input_gradient)


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
    "queried_attention": _queried_attention,
    "frozen_linear": _frozen_product("x"),
    "gathered_linear": _frozen_product("x"),
    "gathered_input_linear": _frozen_product("h"),
    "fused_linear": _fused,
    "merged_linear": _adapted(_merged),
    "masked_linear": _adapted(_masked),
    "dora_norm": _dora_norm,
    "low_rank_product": _low_rank,
    "predicted_scores": _scores,
    "predicted_norms": _norms,
    "context_mean": _mean,
}
"""By name of a call, what counts it; every other call counts nothing."""
