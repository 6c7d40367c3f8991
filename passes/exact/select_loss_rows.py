"""Compute the end of the model for the rows of the loss alone.

    %h = add(%residual, %attended)                     %rows = sparselora.loss_rows(%targets, -100)
    %n = norm(%h) ... ffn ... norm                     %h = add(select_rows(%residual), select_rows(%attended))
    %logits = linear(%n, W)                      ->    %n = norm(%h) ... ffn ... norm
    %loss = cross_entropy(%logits, %targets)           %logits = linear(%n, W)
    return %loss, %logits                              %loss = cross_entropy(%logits, %targets[%rows])
                                                       return %loss, %logits, %rows

A row whose target is `ignore_index` adds nothing to the loss and nothing to any gradient. So only the other rows enter
the cross-entropy, and the selection climbs from there through every call that keeps rows apart (`row_wise.py`) and that
nothing else reads: casts, the final norm, the last block's feed-forward layers with their adapters, its output
projection. It stops where a call mixes rows, or where a tensor is read for all of its rows; the rows are taken there.

Legal because: the mean and the sum of a cross-entropy leave ignored rows out, label smoothing and class weights
included, and the mean divides by what the others weigh. A batch without any row of the loss gives what it gave before:
NaN as a mean, 0 as a sum. Where sizes are fixed (the fact `slots`), `loss_slots` gives the rows: a spare slot has the
target that the loss ignores. Dropout on the way is drawn for all rows and then selected, so that the kept rows see the
numbers they would have seen. Logits that the graph returns leave it as R rows with their positions;
`compiler/outputs.py` puts them into a full tensor whose other rows are NaN, outside of AOTAutograd, where no gradient
of full size is made.

Declines when: `keep_logits` is set; the loss has no reduction, or there are two losses; the targets are not known
before the blocks; the logits, or any other tensor on the way, are read by something else that needs all rows, such as
an output (hidden states) beside the logits.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx

from sparse_compile.graph.declined import Declined
from sparse_compile.graph.facts import LossRows, NarrowedOutput, SitePlan, SparsityPlan, TokenSlots
from sparse_compile.graph.read import argument, op_name, set_argument, tensor_of, tensor_value
from sparse_compile.graph.rewrite import Rewriter, erase_unused, hoist, save_what_precedes
from sparse_compile.graph.sites import FFNSite
from sparse_compile.graph.vocabulary import LINEAR, VIEWS
from sparse_compile.passes.context import PassContext
from sparse_compile.passes.protocol import Pass, PassOutcome
from sparse_compile.passes.read.elementwise import is_elementwise, tensor_operands
from sparse_compile.passes.read.loss_segment import (
    LossSegment,
    Numbering,
    Place,
    find_loss_segment,
    place_of,
)
from sparse_compile.passes.read.row_wise import SAME_ROWS, RowOperand, Sizes, sizes_of, with_negative_dims
from sparse_compile.torch_private.fx import is_erased

_OPS = torch.ops.sparselora
ON_LOSS_ROWS = "runs on the rows of the loss alone, which are all output tokens"


class SelectLossRows(Pass):
    """Leave rows that the loss ignores out of the head, and of what comes before it for as long as rows keep apart."""

    requires = ("plan",)
    # The rows of the loss get slots as well.
    after = ("plan_token_slots",)
    optimises = True

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassOutcome:
        """Rewrite the graph in place."""
        if ctx.facts.loss_rows is not None:
            return PassOutcome(False)
        try:
            segment = find_loss_segment(gm.graph, ctx)
        except Declined as declined:
            return PassOutcome(False, {}, (declined.by(self.name),))
        stats = {"nodes": len(segment.places), "linears": segment.linears, "outputs": len(segment.outputs)}
        loss_rows = _Narrowing(Rewriter(gm, self.name), segment, ctx.facts.slots).run()
        plan = SparsityPlan(tuple(_without_segment(plan, segment.names) for plan in ctx.facts.plan.sites))
        ctx.facts = replace(ctx.facts, loss_rows=loss_rows, plan=plan)
        return PassOutcome(True, stats, segment.stops)


def _without_segment(plan: SitePlan, names: frozenset[str]) -> SitePlan:
    """Take what only rows of the loss run through out of the plan of a site: none of them is a context token."""
    touched = tuple(projection.base for projection in plan.site.projections if projection.base in names)
    if not plan.sparse or not touched:
        return plan
    if isinstance(plan.site, FFNSite):
        return SitePlan(plan.site, 0.0, plan.total, plan.total, ON_LOSS_ROWS)
    return replace(plan, without_context=touched)


class _Narrowing:
    """Rewrites the nodes of a segment in place, so that their names and the facts about them stay.

    Args:
        rewriter: what inserts nodes.
        segment: the nodes.
        slots: the fixed number of rows, some of them spare; None where the number depends on data.
    """

    def __init__(self, rewriter: Rewriter, segment: LossSegment, slots: TokenSlots | None) -> None:
        self.rewriter = rewriter
        self.slots = slots
        self.spare = {} if slots is None else {"spare": True}
        self.segment = segment
        self.top = next(node for node in rewriter.graph.nodes if node.op != "placeholder")
        operands = [operand.node for found in segment.operands.values() for operand in found]
        tensors = [node for node in {*segment.places, *operands} if tensor_value(node) is not None]
        self.shapes = {node: sizes_of(node) for node in tensors}
        self.hoisted: dict[fx.Node, fx.Node] = {}
        self.rows: dict[Numbering, fx.Node] = {}
        self.taken: dict[tuple[fx.Node, Place], fx.Node] = {}

    def run(self) -> LossRows:
        """Rewrite the graph; return what became of it."""
        loss, places = self.segment.loss, self.segment.places
        target, ignored = argument(loss, "target"), argument(loss, "ignore_index", -100)
        value = tensor_of(target)
        with self.rewriter.before(self.top):
            targets = hoist(self.rewriter, target, self.hoisted)
            op, sizes = _OPS.loss_rows.default, tuple[int | str, ...]()
            if self.slots is not None:
                op, sizes = _OPS.loss_slots.default, (self.slots.among(value.shape[0]), self.slots.option)
            rows = self.rewriter.call(op, targets, ignored, *sizes)
            kept = self._picked(targets, rows, ignored)
        self.rows[Numbering()] = rows
        for node in [node for node in self.rewriter.graph.nodes if node in places]:
            self._narrow(node, places[node])
        set_argument(loss, "target", kept)
        outputs = self._add_outputs()
        # The first node may be a checkpoint's, whose marks these have taken over.
        save_what_precedes(self.top)
        erase_unused(target)
        # Roles are read from the labels by name: where only the copy is left, it is they.
        for node, copied in self.hoisted.items():
            if is_erased(node):
                copied.name = node.name
        spare = self.slots is not None
        return LossRows(self.segment.names, outputs, spare)

    def _picked(self, values: fx.Node, rows: fx.Node, spare: Any) -> fx.Node:
        """Insert the elements of a vector at the rows of the loss, and `spare` in spare slots."""
        if self.slots is None:
            return self.rewriter.call(torch.index_select, values, 0, rows)
        picked = self.rewriter.call(_OPS.select_rows.default, values, rows, **self.spare)
        return self.rewriter.call(torch.where, self.rewriter.call(operator.ge, rows, 0), picked, spare)

    def _narrow(self, node: fx.Node, place: Place) -> None:
        """Have a node compute the rows of the loss."""
        operands = self.segment.operands[node]
        inner = self.shapes[node][len(place.lead) :] if node in self.shapes else ()
        first = operands[0].node
        with self.rewriter.before(node):
            taken = {operand.node: self._rows_of(operand, place) for operand in operands}
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

    def _rows_of(self, operand: RowOperand, place: Place) -> fx.Node:
        """Return an operand for rows of the loss: as it is where it is narrowed itself, else with its rows taken."""
        if operand.node in self.segment.places:
            return operand.node
        key = operand.node, place_of(operand, place.numbering)
        if key not in self.taken:
            flat = operand.node
            if len(operand.lead) != 1:
                flat = self.rewriter.method("flatten", flat, 0, len(operand.lead) - 1)
            rows = self._numbered(key[1].numbering)
            self.taken[key] = self.rewriter.call(_OPS.select_rows.default, flat, rows, **self.spare)
        return self.taken[key]

    def _numbered(self, numbering: Numbering) -> fx.Node:
        """Return the positions of the rows of the loss in a numbering, (R,)."""
        if numbering not in self.rows:
            assert numbering.inner is not None
            inner = self._numbered(numbering.inner)
            value = tensor_of(inner)
            with self.rewriter.before(self.top):
                lead = self._sizes(numbering.lead)
                count = functools.reduce(self._times, lead)
                positions = self.rewriter.call(torch.arange, count, device=value.device)
                positions = self.rewriter.method("reshape", positions, *lead)
                slices = tuple(slice(*(self._bound(bound) for bound in part)) for part in numbering.slices)
                sliced = self.rewriter.call(operator.getitem, positions, slices)
                sliced = self.rewriter.method("reshape", sliced, -1)
                self.rows[numbering] = self._picked(sliced, inner, -1)
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
        """Draw the dropout of all rows, as it would have been drawn, and use that of the rows of the loss."""
        value = tensor_of(node)
        sizes = self._sizes(place.lead + inner)
        ones = self.rewriter.call(torch.ones, *sizes, dtype=value.dtype, device=value.device)
        p, training = argument(node, "p", 0.5), argument(node, "training", True)
        drawn = self.rewriter.call(torch.nn.functional.dropout, ones, p, training)
        if len(place.lead) != 1:
            drawn = self.rewriter.method("flatten", drawn, 0, len(place.lead) - 1)
        rows = self._numbered(place.numbering)
        if self.slots is None:
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

    def _add_outputs(self) -> tuple[NarrowedOutput, ...]:
        """Return the positions of the rows beside the outputs that are narrowed."""
        returned = self.rewriter.graph.output_node()
        leaves = list(returned.args[0]) if isinstance(returned.args[0], tuple | list) else []
        narrowed = []
        for index, node in self.segment.outputs:
            place = self.segment.places[node]
            rows = self._numbered(place.numbering)
            if rows not in leaves:
                leaves.append(rows)
            narrowed.append(NarrowedOutput(index, leaves.index(rows), place.lead))
        if narrowed:
            returned.args = (tuple(leaves),)
        return tuple(narrowed)
