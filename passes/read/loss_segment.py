"""Find the part of a graph that only rows of the loss need.

A climb (`row_climb.py`) begins at the logits of the cross-entropy and goes against the flow of data.
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
from sparse_compile.passes.read.row_climb import Numbering, Place, RowClimb
from sparse_compile.passes.read.row_wise import SAME_ROWS, RowOperand, sizes_of


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
    climb = RowClimb({loss, returned}, "select_loss_rows")
    climb.want(logits, Place(sizes_of(logits)[:1], Numbering()))
    climb.run(graph)
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
