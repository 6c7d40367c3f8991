"""Find the part of a graph that only rows of the loss need.

A climb begins at the logits of the cross-entropy and goes against the flow of data. It passes each call that keeps rows
apart (`row_wise.py`) and that nothing else reads. It ends where a call mixes rows, and where a tensor is needed for all
of its rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from sparse_compile.graph.declined import Declined
from sparse_compile.graph.facts import Rejection
from sparse_compile.graph.read import argument, calls_torch, op_name, tensor_value
from sparse_compile.graph.vocabulary import LINEAR, MATMULS, VIEWS
from sparse_compile.passes.context import PassContext
from sparse_compile.passes.read.label_positions import available_early
from sparse_compile.passes.read.row_wise import (
    SAME_ROWS,
    RowOperand,
    Sizes,
    Slice,
    row_operands,
    sizes_of,
)


@dataclass(frozen=True)
class Numbering:
    """How the rows of a tensor are numbered: as the rows of the loss are, or with more rows that slices leave out.

    Attributes:
        slices: of each dimension in `lead`, what the slices keep; empty where rows are numbered as those of the loss.
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


@dataclass(frozen=True)
class LossSegment:
    """The nodes to compute for rows of the loss alone.

    Attributes:
        loss: the cross-entropy.
        places: for each node of the segment, its rows before any were left out.
        operands: for each node of the segment, the operands that have rows.
        outputs: the nodes that the graph returns, each with its place among the outputs.
        stops: where the climb ended because a call mixes rows.
    """

    loss: fx.Node
    places: dict[fx.Node, Place]
    operands: dict[fx.Node, list[RowOperand]]
    outputs: tuple[tuple[int, fx.Node], ...]
    stops: tuple[Rejection, ...]

    @property
    def names(self) -> frozenset[str]:
        """The names of the nodes."""
        return frozenset(node.name for node in self.places)

    @property
    def linears(self) -> int:
        """Number of linear layers, adapters' included."""
        return sum(node.target is LINEAR for node in self.places)


def find_loss_segment(graph: fx.Graph, ctx: PassContext) -> LossSegment:
    """Return the nodes to compute for rows of the loss alone.

    Raises:
        Declined: there are none.
    """
    if ctx.env.config.keep_logits:
        raise Declined("graph", "keep_logits asks for every row of the logits")
    losses = [node for node in graph.nodes if op_name(node) == "cross_entropy" and calls_torch(node)]
    if len(losses) != 1:
        found = "no cross-entropy is" if not losses else f"{len(losses)} cross-entropies are"
        raise Declined("graph", f"{found} in the graph; the rows of exactly one can be told")
    (loss,) = losses
    logits = _checked_logits(loss)
    returned = graph.output_node()
    leaves = list(returned.args[0]) if isinstance(returned.args[0], tuple | list) else []
    climb = _Climb(loss, returned)
    climb.run(graph, logits)
    # The graph may return the logits that the loss is computed from, and nothing else of the segment.
    chain = _logits_chain(logits)
    outputs = [(index, node) for index, node in enumerate(leaves) if isinstance(node, fx.Node) and node in climb.places]
    for _, node in outputs:
        if node not in chain:
            raise Declined(node, "the graph returns it for all rows, beside the loss and its logits")
    if not any(node.target is LINEAR or op_name(node) in MATMULS for node in climb.places):
        reason = climb.stops[0].reason if climb.stops else f"{climb.reader or 'something else'} reads it for all rows"
        raise Declined(climb.stops[0].node if climb.stops else logits.name, reason)
    return LossSegment(loss, climb.places, climb.operands, tuple(outputs), tuple(climb.stops))


def _checked_logits(loss: fx.Node) -> fx.Node:
    """Return the logits of a loss that may leave rows out, (N, V)."""
    logits, target = argument(loss, "input"), argument(loss, "target")
    scores, labels = tensor_value(logits), tensor_value(target)
    if scores is None or labels is None or scores.dim() != 2 or labels.dim() != 1 or labels.is_floating_point():
        raise Declined(loss, "the loss is not that of (N, classes) logits and N class numbers")
    if argument(loss, "reduction", "mean") not in ("mean", "sum") or argument(loss, "reduce") is not None:
        raise Declined(loss, "the loss has a value for each row")
    if not available_early(target):
        raise Declined(target, "the targets are computed from activations: not known before the blocks")
    assert isinstance(logits, fx.Node)
    return logits


def _logits_chain(logits: fx.Node) -> set[fx.Node]:
    """Return the tensors that are the logits of the loss, seen through casts, views and slices."""
    chain = {logits}
    node = logits
    while op_name(node) in (VIEWS | SAME_ROWS | {"getitem"}) - {"dropout"}:
        source = argument(node, "input")
        if not isinstance(source, fx.Node):
            break
        node = source
        chain.add(node)
    return chain


class _Climb:
    """Walks from the logits of a loss towards the inputs, for as long as rows keep apart."""

    def __init__(self, loss: fx.Node, returned: fx.Node) -> None:
        self.readers = {loss, returned}
        self.wanted: dict[fx.Node, Place | None] = {}
        self.places: dict[fx.Node, Place] = {}
        self.operands: dict[fx.Node, list[RowOperand]] = {}
        self.stops: list[Rejection] = []
        self.reader = ""

    def run(self, graph: fx.Graph, logits: fx.Node) -> None:
        """Fill in `places`, `operands` and `stops`. All users of a node are seen before it."""
        self.wanted[logits] = Place(sizes_of(logits)[:1], Numbering())
        for node in reversed(graph.nodes):
            place = self.wanted.get(node)
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
                self.stops.append(stop.by("select_loss_rows"))
                continue
            self.places[node] = place
            self.operands[node] = operands
            for operand in operands:
                self._want(operand, place.numbering)

    def _want(self, operand: RowOperand, numbering: Numbering) -> None:
        place = place_of(operand, numbering)
        # Two readers with other rows in mind: the operand stays whole, and each takes its own.
        known = self.wanted.setdefault(operand.node, place)
        if known != place:
            self.wanted[operand.node] = None


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
