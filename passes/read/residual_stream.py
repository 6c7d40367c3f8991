"""Find the residual stream that an attention block reads, behind its norm.

    %h = add(%residual, %mlp)          the stream, as block l reads it
    %n = norm(%h)                      spelt as one call or as several: all of it is computed from %h, row by row
    %q, %k, %v = <projections>(%n)

Everything that the projections read of a token passes through one node, a sum of two tensors of full width: the
nearest such node is the stream. Where a model adds no two tensors on the way (the first block), it is the node behind
which rows cannot be followed any more. A block without a norm in front reads the stream itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from sparse_compile.graph.declined import Declined
from sparse_compile.graph.read import op_name
from sparse_compile.graph.sites import AttentionSite
from sparse_compile.graph.vocabulary import SUMS
from sparse_compile.graph.walk import reach
from sparse_compile.passes.read.row_wise import Sizes, row_operands, sizes_of


@dataclass(frozen=True)
class BlockInput:
    """What an attention block reads of the residual stream.

    Attributes:
        site: the block.
        source: what its projections read: the stream behind a norm.
        stream: the stream.
        readers: the users of the stream that lead to query, key and value.
    """

    site: AttentionSite
    source: fx.Node
    stream: fx.Node
    readers: tuple[fx.Node, ...]


def block_input(site: AttentionSite, nodes: dict[str, fx.Node]) -> BlockInput:
    """Return what an attention block reads.

    Raises:
        Declined: no one node holds all that it reads.
    """
    source = nodes[site.source]
    stream = _stream_before(source)
    outputs = [nodes[each.output] for each in (site.query, site.key, site.value)]
    # All ways back from the projections end at the stream, or at what depends on no token.
    way = reach(outputs, lambda node: () if node is stream else node.all_input_nodes)
    return BlockInput(site, source, stream, tuple(user for user in stream.users if user in way))


def _stream_before(source: fx.Node) -> fx.Node:
    lead = sizes_of(source)[:-1]
    open_: dict[fx.Node, Sizes] = {source: lead}
    while open_:
        node = max(open_)
        alone = len(open_) == 1
        if alone and _joins_two(node, open_[node]):
            return node
        lead = open_.pop(node)
        try:
            operands = row_operands(node, lead)
        except Declined as declined:
            if alone:
                return node
            raise Declined(source, f"the residual stream in front of it is not to be seen: {declined.reason}") from None
        for operand in operands:
            open_[operand.node] = operand.lead
    raise Declined(source, "no residual stream leads to it")


def _joins_two(node: fx.Node, lead: Sizes) -> bool:
    """Tell whether a node is the sum of two tensors of its own shape."""
    if op_name(node) not in SUMS:
        return False
    operands = row_operands(node, lead)
    return len({each.node for each in operands}) == 2 and all(
        sizes_of(each.node) == sizes_of(node) for each in operands
    )
