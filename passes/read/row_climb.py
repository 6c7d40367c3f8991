"""Climb from tensors of which some rows are wanted, against the flow of data, for as long as rows keep apart.

A climb passes each call that keeps rows apart (`row_wise.py`) and that nothing else reads. It ends where a call mixes
rows, and where a tensor is needed for all of its rows.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import fx

from sparse_compile.graph.declined import Declined
from sparse_compile.graph.facts import Rejection
from sparse_compile.graph.read import op_name, tensor_value
from sparse_compile.passes.read.label_positions import available_early
from sparse_compile.passes.read.row_wise import RowOperand, Sizes, Slice, row_operands, sizes_of


@dataclass(frozen=True)
class Numbering:
    """How the rows of a tensor are numbered: as those that are wanted are, or with more rows that slices leave out.

    Attributes:
        slices: of each dimension in `lead`, what the slices keep; empty where rows are numbered as those wanted are.
        lead: sizes of the leading dimensions that are sliced.
        inner: how the rows that the slices keep are numbered.
    """

    slices: tuple[Slice, ...] = ()
    lead: Sizes = ()
    inner: Numbering | None = None


@dataclass(frozen=True)
class Place:
    """The rows of a tensor: the leading sizes, whose product is their number, and how they are numbered."""

    lead: Sizes
    numbering: Numbering


class RowClimb:
    """Walks against the flow of data for as long as rows keep apart and nothing else reads them.

    Args:
        readers: nodes that want some rows of what they read, or take what they read out of the climb's hands.
        rule: the pass that asks, named in `stops`.

    Attributes:
        places: for each node of which some rows are enough, its rows before any were left out.
        operands: for each of them, the operands that have rows.
        stops: where the climb ended because a call mixes rows.
        reader: the first node met that reads all rows of a tensor; empty where there was none.
    """

    def __init__(self, readers: Collection[fx.Node], rule: str) -> None:
        self.readers = readers
        self.rule = rule
        self.places: dict[fx.Node, Place] = {}
        self.operands: dict[fx.Node, list[RowOperand]] = {}
        self.stops: list[Rejection] = []
        self.reader = ""
        self._wanted: dict[fx.Node, Place | None] = {}

    def want(self, node: fx.Node, place: Place) -> None:
        """Ask for rows of a tensor. Two readers with other rows in mind: it stays whole, and each takes its own."""
        if self._wanted.setdefault(node, place) != place:
            self._wanted[node] = None

    def run(self, graph: fx.Graph) -> None:
        """Fill in `places`, `operands` and `stops`. All users of a node are seen before it."""
        for node in reversed(graph.nodes):
            place = self._wanted.get(node)
            if place is None:
                continue
            others = [user for user in node.users if user not in self.places and user not in self.readers]
            if others:
                self.reader = self.reader or others[0].name
                continue
            try:
                operands = row_operands(node, place.lead)
                _check_sizes(node, place, operands)
            except Declined as stop:
                self.stops.append(stop.by(self.rule))
                continue
            self.places[node] = place
            self.operands[node] = operands
            for operand in operands:
                self.want(operand.node, place_of(operand, place.numbering))
        # Rows are taken of tensors: a part of a split that stays whole is whole itself.
        for node, operands in list(self.operands.items()):
            if any(each.node not in self.places and tensor_value(each.node) is None for each in operands):
                del self.places[node], self.operands[node]


def place_of(operand: RowOperand, numbering: Numbering) -> Place:
    """Return the rows of an operand, given how the rows of the result are numbered."""
    if operand.slices is not None:
        numbering = Numbering(operand.slices, operand.lead, numbering)
    return Place(operand.lead, numbering)


def _check_sizes(node: fx.Node, place: Place, operands: list[RowOperand]) -> None:
    """Decline a call whose rewrite would need a size that no input of the graph has."""
    sliced = any(operand.slices is not None for operand in operands)
    drawn = op_name(node) == "dropout"
    lead = operands[0].lead if sliced else place.lead
    if (sliced or drawn) and not all(size.is_Integer or size.is_Symbol for size in lead):
        raise Declined(node, f"{op_name(node)} has a number of tokens that is computed")
    bounds = [bound for operand in operands for part in operand.slices or () for bound in part]
    if not all(available_early(bound) for bound in bounds if isinstance(bound, fx.Node)):
        raise Declined(node, f"{op_name(node)} slices by a number that is computed from activations")
    if drawn and any(not size.is_Integer for size in sizes_of(node)[len(place.lead) :]):
        raise Declined(node, "dropout has a number of channels that is not fixed")
