"""Have nodes compute some rows alone, in place, so that their names and the facts about them stay."""

from __future__ import annotations

import functools
import operator
from typing import Any

import sympy
import torch
from torch import fx

from sparse_compile.graph.read import argument, op_name, tensor_of, tensor_value
from sparse_compile.graph.rewrite import Rewriter, hoist
from sparse_compile.graph.vocabulary import LINEAR, VIEWS
from sparse_compile.passes.read.elementwise import is_elementwise, tensor_operands
from sparse_compile.passes.read.row_climb import Numbering, Place, place_of
from sparse_compile.passes.read.row_wise import SAME_ROWS, RowOperand, Sizes, sizes_of, with_negative_dims

_OPS = torch.ops.sparselora


class NarrowedRows:
    """Rewrites what a climb has found.

    Args:
        rewriter: what inserts nodes.
        places: for each node to narrow, its rows before any are left out.
        operands: for each of them, the operands that have rows.
        top: the node before which positions of rows are computed.
        spare: whether the number of rows is fixed, some of them spare, of position -1.
    """

    def __init__(
        self,
        rewriter: Rewriter,
        places: dict[fx.Node, Place],
        operands: dict[fx.Node, list[RowOperand]],
        top: fx.Node,
        *,
        spare: bool,
    ) -> None:
        self.rewriter = rewriter
        self.places = places
        self.operands = operands
        self.top = top
        self.spare: dict[str, bool] = {"spare": True} if spare else {}
        tensors = [
            node
            for node in {*places, *(each.node for found in operands.values() for each in found)}
            if tensor_value(node) is not None
        ]
        self.shapes = {node: sizes_of(node) for node in tensors}
        self.hoisted: dict[fx.Node, fx.Node] = {}
        self.rows: dict[Numbering, fx.Node] = {}
        self.taken: dict[tuple[fx.Node, Place], fx.Node] = {}

    def run(self, rows: fx.Node) -> None:
        """Narrow every node to the rows at some positions, (R,)."""
        self.rows[Numbering()] = rows
        for node in [node for node in self.rewriter.graph.nodes if node in self.places]:
            self._narrow(node, self.places[node])

    def picked(self, values: fx.Node, rows: fx.Node, spare: Any) -> fx.Node:
        """Insert the elements of a vector at some positions, and `spare` in spare slots."""
        if not self.spare:
            return self.rewriter.call(torch.index_select, values, 0, rows)
        picked = self.rewriter.call(_OPS.select_rows.default, values, rows, **self.spare)
        return self.rewriter.call(torch.where, self.rewriter.call(operator.ge, rows, 0), picked, spare)

    def _narrow(self, node: fx.Node, place: Place) -> None:
        """Have a node compute its rows alone."""
        operands = self.operands[node]
        inner = self.shapes[node][len(place.lead) :] if node in self.shapes else ()
        first = operands[0].node
        with self.rewriter.before(node):
            taken = {operand.node: self.rows_of(operand, place) for operand in operands}
            if is_elementwise(node) and op_name(node) not in SAME_ROWS:
                for operand in [each for each in tensor_operands(node) if each not in taken]:
                    self._drop_leading_ones(node, operand, len(inner))
            if first in self.shapes:
                with_negative_dims(node, len(self.shapes[first]))
            for old, new in taken.items():
                node.replace_input_with(old, new)
            if op_name(node) == "dropout":
                self._draw_for_all(node, place, inner)
            elif node.target is LINEAR and self.shapes[first][-1] == 1:
                self._outer_product(node)
            elif op_name(node) in VIEWS or (op_name(node) == "getitem" and first in self.shapes):
                same = self.shapes[first][len(operands[0].lead) :] == inner
                self._view(node, taken[first], None if same else inner)
        self.rewriter.reevaluate(node)

    def rows_of(self, operand: RowOperand, place: Place) -> fx.Node:
        """Return an operand for the rows of a place: as it is where it is narrowed itself, else with its rows taken."""
        if operand.node in self.places:
            return operand.node
        key = operand.node, place_of(operand, place.numbering)
        if key not in self.taken:
            flat = operand.node
            if len(operand.lead) != 1:
                flat = self.rewriter.method("flatten", flat, 0, len(operand.lead) - 1)
            rows = self.numbered(key[1].numbering)
            self.taken[key] = self.rewriter.call(_OPS.select_rows.default, flat, rows, **self.spare)
        return self.taken[key]

    def numbered(self, numbering: Numbering) -> fx.Node:
        """Return the positions of the rows in a numbering, (R,)."""
        if numbering not in self.rows:
            assert numbering.inner is not None
            inner = self.numbered(numbering.inner)
            value = tensor_of(inner)
            with self.rewriter.before(self.top):
                lead = self._sizes(numbering.lead)
                count = functools.reduce(self._times, lead)
                positions = self.rewriter.call(torch.arange, count, device=value.device)
                positions = self.rewriter.method("reshape", positions, *lead)
                slices = tuple(slice(*(self._bound(bound) for bound in part)) for part in numbering.slices)
                sliced = self.rewriter.call(operator.getitem, positions, slices)
                sliced = self.rewriter.method("reshape", sliced, -1)
                self.rows[numbering] = self.picked(sliced, inner, -1)
        return self.rows[numbering]

    def _sizes(self, sizes: Sizes) -> list[fx.Node | int]:
        """Write sizes into the graph: a number, or the size of an input that has this very symbol."""
        return [int(size) if size.is_Integer else self._symbol(size) for size in sizes]

    def _symbol(self, symbol: sympy.Expr) -> fx.Node:
        for node in self.rewriter.graph.nodes:
            value = tensor_value(node) if node.op == "placeholder" else None
            if value is not None and symbol in sizes_of(node):
                with self.rewriter.before(self.top):
                    return self.rewriter.method("size", node, sizes_of(node).index(symbol))
        raise AssertionError(f"no input has the size {symbol}")

    def _times(self, left: fx.Node | int, right: fx.Node | int) -> fx.Node | int:
        if isinstance(left, int) and isinstance(right, int):
            return left * right
        return self.rewriter.call(operator.mul, left, right)

    def _bound(self, bound: Any) -> Any:
        return hoist(self.rewriter, bound, self.hoisted) if isinstance(bound, fx.Node) else bound

    def _drop_leading_ones(self, node: fx.Node, operand: fx.Node, inner_rank: int) -> None:
        """Flatten the leading dimensions of size 1 of what is broadcast, which are more than rows have now."""
        extra = len(sizes_of(operand)) - inner_rank - 1
        if extra > 0:
            node.replace_input_with(operand, self.rewriter.method("flatten", operand, 0, extra))

    def _draw_for_all(self, node: fx.Node, place: Place, inner: Sizes) -> None:
        """Draw the dropout of all rows, as it would have been drawn, and use that of the rows that are left."""
        value = tensor_of(node)
        sizes = self._sizes(place.lead + inner)
        ones = self.rewriter.call(torch.ones, *sizes, dtype=value.dtype, device=value.device)
        p, training = argument(node, "p", 0.5), argument(node, "training", True)
        drawn = self.rewriter.call(torch.nn.functional.dropout, ones, p, training)
        if len(place.lead) != 1:
            drawn = self.rewriter.method("flatten", drawn, 0, len(place.lead) - 1)
        rows = self.numbered(place.numbering)
        if not self.spare:
            drawn = self.rewriter.call(torch.index_select, drawn, 0, rows)
        else:
            drawn = self.rewriter.call(_OPS.select_rows.default, drawn, rows, **self.spare)
        node.target, node.args, node.kwargs = torch.mul, (argument(node, "input"), drawn), {}

    def _outer_product(self, node: fx.Node) -> None:
        """Multiply one column with one row element by element.

        The gradient of `mm` looks at strides: with one column it would compare the number of rows with 1, which no
        guard can decide.
        """
        value = tensor_of(node)
        x, weight, bias = (argument(node, name) for name in ("input", "weight", "bias"))
        # A linear layer casts its operands under autocast, a product of elements does not.
        x, weight, bias = (
            operand if tensor_value(operand) is None or tensor_value(operand).dtype == value.dtype  # type: ignore[union-attr]
            else self.rewriter.method("to", operand, value.dtype)
            for operand in (x, weight, bias)
        )  # fmt: skip
        row = self.rewriter.method("t", weight)
        if bias is None:
            node.target, node.args, node.kwargs = torch.mul, (x, row), {}
        else:
            node.target, node.args, node.kwargs = torch.addcmul, (bias, x, row), {}

    def _view(self, node: fx.Node, operand: fx.Node, inner: Sizes | None) -> None:
        """Have a view or a slice see (R, *inner); `inner` is None where only leading dimensions changed."""
        node.op, node.kwargs = "call_method", {}
        if inner is None:
            node.target, node.args = "contiguous", (operand,)
        else:
            rows = self.rewriter.method("size", operand, 0)
            node.target, node.args = "reshape", (operand, rows, *self._sizes(inner))
