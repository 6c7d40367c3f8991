"""Have context tokens leave the residual stream before a block, and be read as keys and values alone from then on.

    %k = linear(norm(%h_l), Wk)            %m   = put_rows(%h_l [output rows], %h_m [context rows] + U_l Q_l %x_m + b_l)
    %q = linear(norm(%h_l), Wq)     ->     %k   = linear(norm(%m), Wk)
    ... attention, feed-forward ...        %q   = place_rows(linear(%x_l [output rows], Wq))
                                           ... attention of these queries, all else for output rows alone

%h_m is the stream at the block of the exit, m, and %x_m what its projections read of it. Block m itself computes its
keys and values of the stream as it is. Each later block l reads, for context tokens, the stream of the exit and what a
map, fitted to the change of the stream between the two blocks, adds to it: its norm, keys and values with their
adapters are computed of that for all tokens. Queries, attention's results, output projections and feed-forward blocks
of context tokens are read by nothing any more: a climb from what is still wanted (`row_climb.py`) narrows them all, and
the residual stream between them, to the rows of output tokens.

Approximate by intent (context surrogates, docs/semantics.md): context tokens are seen as the maps have them. The
gradients are the exact gradients of that function; those of the maps' inputs may be left out by an option.
Declines when: something else still reads the stream of context tokens behind the exit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from sparse_compile.graph.declined import Declined
from sparse_compile.graph.facts import Rejection, SitePlan, SparsityPlan
from sparse_compile.graph.read import argument, nodes_by_name, op_name, tensor_of, tensor_value
from sparse_compile.graph.rewrite import Rewriter, save_for_backward, take_over
from sparse_compile.graph.sites import AttentionSite
from sparse_compile.graph.walk import reach
from sparse_compile.kernels.providers import REFERENCE, OpCall
from sparse_compile.kernels.queried_attention import QUERIED_ATTENTION
from sparse_compile.passes.context import PassContext
from sparse_compile.passes.protocol import Numerics, Pass, PassOutcome
from sparse_compile.passes.read.fused_attention import operands_of, scale_of
from sparse_compile.passes.read.residual_stream import BlockInput, block_input
from sparse_compile.passes.read.row_climb import Numbering, Place, RowClimb
from sparse_compile.passes.read.row_wise import sizes_of
from sparse_compile.passes.write.affine_map import insert_map, observe_rows
from sparse_compile.passes.write.narrowed_rows import NarrowedRows
from sparse_compile.passes.write.sparse_rows import SparseRows
from sparse_compile.torch_private.fake import size_expression

_OPS = torch.ops.sparselora


class ExitContext(Pass):
    """Rewrite the blocks behind the exit of the plan."""

    requires = ("predictors",)
    # Rows of the loss are taken of what is narrowed here.
    after = ("select_loss_rows",)
    numerics = Numerics.APPROXIMATE
    sparsifies = "exit"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassOutcome:
        """Rewrite the graph in place."""
        plans = {plan.site.identity: plan for plan in ctx.facts.plan.sites if plan.left}
        sites = [plan.site for plan in plans.values() if isinstance(plan.site, AttentionSite)]
        if not sites:
            return PassOutcome(False)
        nodes = nodes_by_name(gm.graph)
        try:
            exit_ = _find(gm.graph, [block_input(site, nodes) for site in sites], ctx)
        except Declined as declined:
            ctx.facts = replace(ctx.facts, plan=_without_exit(ctx.facts.plan, declined.reason))
            return PassOutcome(False, {}, (declined.by(self.name),))
        rewriter = Rewriter(gm, self.name)
        exiting = _Exiting(rewriter, exit_, ctx)
        exiting.run(plans)
        stats = {"blocks": len(sites), "nodes": len(exit_.climb.places), "inserted": rewriter.inserted}
        whole = _computed_for_all(exit_.climb, plans.values(), ctx)
        return PassOutcome(True, stats, (*exiting.rejections, *whole))


def _computed_for_all(climb: RowClimb, plans: Iterable[SitePlan], ctx: PassContext) -> Iterator[Rejection]:
    """Yield the layers behind the exit that go on computing context tokens, which nothing reads."""
    assert ctx.facts.loss_rows is not None
    narrowed = {node.name for node in climb.places} | ctx.facts.loss_rows.nodes
    for plan in plans:
        layers = plan.site.projections
        if isinstance(plan.site, AttentionSite):
            layers = (plan.site.query, plan.site.output)
        for projection in layers:
            if projection.base not in narrowed:
                why = next((each.reason for each in climb.stops), "it is part of a product that they need")
                yield Rejection("exit_context", projection.name, f"is computed for all tokens: {why}")


def _without_exit(plan: SparsityPlan, reason: str) -> SparsityPlan:
    """Take the exit out of a plan: the blocks behind it stay dense."""
    return SparsityPlan(
        tuple(
            SitePlan(each.site, 0.0, each.total, each.total, f"context cannot leave before it: {reason}")
            if each.left
            else each
            for each in plan.sites
        )
    )


@dataclass(frozen=True)
class _Exit:
    """What is to be rewritten.

    Attributes:
        blocks: what each attention block behind the exit reads, the block of the exit first.
        queries: by site identity, the outputs of the query projections of which rows are enough.
        selected: the nodes that take rows of the loss of what is narrowed.
        climb: the nodes to narrow.
    """

    blocks: Sequence[BlockInput]
    queries: dict[str, fx.Node]
    selected: tuple[fx.Node, ...]
    climb: RowClimb


def _find(graph: fx.Graph, blocks: Sequence[BlockInput], ctx: PassContext) -> _Exit:
    """Climb from all that is wanted of output tokens behind the exit.

    Raises:
        Declined: something reads all rows of the stream.
    """
    if ctx.facts.loss_rows is None:
        raise Declined("graph", "the end of the model is computed for all tokens")
    nodes = nodes_by_name(graph)
    behind = reach([blocks[0].stream], lambda node: node.users)
    loss_rows = [node for node in graph.nodes if node.target is _OPS.select_rows.default and node.args[0] in behind]
    # The rows of a fused layer's query cannot be left out of its one product.
    queries = {
        block.site.identity: nodes[block.site.query.output] for block in blocks if block.site.query.fused is None
    }
    readers = {*loss_rows, *(user for query in queries.values() for user in query.users)}
    readers |= {user for block in blocks[1:] for user in block.readers}
    climb = RowClimb(readers, "exit_context")
    for node in loss_rows:
        climb.want(node.args[0], Place(sizes_of(node.args[0])[:1], Numbering()))
    wanted = [*queries.values(), *(block.stream for block in blocks[1:])]
    for node in wanted:
        climb.want(node, Place(sizes_of(node)[:-1], Numbering()))
    climb.run(graph)
    for block in blocks[1:]:
        if block.stream not in climb.places:
            others = (user for user in block.stream.users if user not in climb.places and user not in readers)
            reader = next(others, None)
            why = f"{reader.name} reads the residual stream of all tokens" if reader else _stop(climb, block)
            raise Declined(block.site.name, why)
    selected = tuple(node for node in loss_rows if node.args[0] in climb.places)
    return _Exit(blocks, queries, selected, climb)


def _stop(climb: RowClimb, block: BlockInput) -> str:
    found = next((each.reason for each in climb.stops if each.node == block.stream.name), "")
    return found or "its residual stream is not computed token by token"


class _Exiting:
    """Rewrites a graph.

    Args:
        rewriter: what inserts nodes.
        found: what is to be rewritten.
        ctx: holds rows and maps.
    """

    def __init__(self, rewriter: Rewriter, found: _Exit, ctx: PassContext) -> None:
        self.rewriter = rewriter
        self.found = found
        self.ctx = ctx
        self.rows = SparseRows(rewriter, ctx)
        self.top = self.rows.rows[1].next
        spare = ctx.facts.slots is not None
        self.narrowed = NarrowedRows(rewriter, found.climb.places, found.climb.operands, self.top, spare=spare)
        self.rejections: list[Rejection] = []

    def run(self, plans: dict[str, SitePlan]) -> None:
        """Rewrite the blocks."""
        first, *later = self.found.blocks
        with self.rewriter.before(self.top):
            slots = self.rewriter.call(_OPS.query_slots.default, self.rows.roles, self._slots_of_a_sequence())
            tokens = self.rewriter.method("numel", self.rows.roles)
        save_for_backward(slots)
        stream, features = (self._split(node) for node in (first.stream, first.source))
        self.narrowed.run(self.rows.rows[0])
        for block in later:
            self._merge(block, plans[block.site.identity], stream, features)
        for block in self.found.blocks:
            self._place_query(block, tokens)
            self._attend(block, slots)
        self._select(tokens)

    def _slots_of_a_sequence(self) -> int | fx.Node | None:
        """Return how many queries a sequence has room for, where sizes are fixed."""
        slots = self.ctx.facts.slots
        if slots is None:
            return None
        length = tensor_of(self.rows.roles).shape[1]
        if self.ctx.env.all_output:
            return length if isinstance(length, int) else self.rewriter.method("size", self.rows.roles, 1)
        return slots.among(length)

    def _split(self, node: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Split a tensor of the block of the exit; what is narrowed takes its rows from there."""
        with self.rewriter.before(node.next, self.found.blocks[0].site.name):
            output, context = self.rows.split(node)
        self.narrowed.taken[node, Place(sizes_of(node)[:-1], Numbering())] = output
        return output, context

    def _merge(
        self, block: BlockInput, plan: SitePlan, stream: tuple[fx.Node, fx.Node], features: tuple[fx.Node, fx.Node]
    ) -> None:
        """Have the norm of a block, its keys and values read the stream of the exit and its map, for context tokens."""
        rewriter, rows = self.rewriter, self.rows
        readers = [user for user in block.readers if user not in self.narrowed.places]
        with rewriter.before(min(readers), block.site.name):
            output = block.stream
            if plan.online:
                change = rewriter.call(torch.sub, output, stream[0])
                observe_rows(plan, rows, features[0], change, self.ctx)
            mapped = insert_map(plan, rows, features[1], self.ctx)
            context = rows.cast_like(rewriter.call(torch.add, stream[1], mapped), output)
            width = tensor_of(output).shape[-1]
            assert isinstance(width, int)
            merged = rows.merge(output, context, self.found.blocks[0].stream, width)
        for reader in readers:
            reader.replace_input_with(output, merged)

    def _place_query(self, block: BlockInput, tokens: fx.Node) -> None:
        """Put the queries of output tokens in their places: what comes before attention sees all tokens."""
        query = self.found.queries.get(block.site.identity)
        if query is None or query not in self.narrowed.places:
            return
        with self.rewriter.before(query.next, block.site.name):
            placed = self.rewriter.call(
                _OPS.place_rows.default, query, self.rows.rows[0], tokens, **self.narrowed.spare
            )
            sizes = self.rows.leading_sizes(self.found.blocks[0].stream)
            whole = self.rewriter.method("reshape", placed, *sizes, block.site.query.out_features)
        query.replace_all_uses_with(whole, delete_user_cb=lambda user: user is not placed)

    def _attend(self, block: BlockInput, slots: fx.Node) -> None:
        """Compute attention for the queries of output tokens alone, where an op does."""
        node = self.rows.nodes[block.site.attention]
        try:
            provider = queried_provider(node, self.rows.autocast)
        except Declined as declined:
            self.rejections.append(declined.by("exit_context"))
            return
        options = argument(node, "attn_mask"), slots, argument(node, "is_causal", False), scale_of(node)
        with self.rewriter.before(node, block.site.name):
            operands = (*operands_of(node), *options)
            pair = self.rewriter.call(_OPS.queried_attention.default, *operands, provider=provider)
            out, *_ = self.rewriter.items(pair, 1)
        take_over(node, out)

    def _select(self, tokens: fx.Node) -> None:
        """Take rows of the loss of the rows of output tokens."""
        places: dict[fx.Node, fx.Node] = {}
        for node in self.found.selected:
            rows = node.args[1]
            assert isinstance(rows, fx.Node)
            if rows not in places:
                with self.rewriter.before(node):
                    places[rows] = self._among_output(rows, tokens)
            node.args = (node.args[0], places[rows], *node.args[2:])

    def _among_output(self, rows: fx.Node, tokens: fx.Node) -> fx.Node:
        """Insert the places that positions of the loss have among those of output tokens."""
        call, output = self.rewriter.call, self.rows.rows[0]
        count = self.rewriter.method("size", output, 0)
        numbers = call(torch.arange, count, device=tensor_of(output).device)
        inverse = call(_OPS.place_rows.default, numbers, output, tokens, **self.narrowed.spare)
        return self.narrowed.picked(inverse, rows, -1)


def queried_provider(node: fx.Node, casts: Mapping[str, Mapping[str, torch.dtype | None]]) -> str:
    """Return what computes an attention for some queries.

    Args:
        node: the attention.
        casts: by device type and name of a node, what autocast casts operands to.

    Raises:
        Declined: nothing does; it is computed for all.
    """
    if op_name(node) != "scaled_dot_product_attention":
        raise Declined(node, "attention that is written out is computed for all queries")
    operands = [tensor_value(operand) for operand in operands_of(node)]
    if any(value is None or value.dim() != 4 for value in operands):
        raise Declined(node, "its operands are not of (batch, heads, tokens, channels)")
    query, key, value = (each for each in operands if each is not None)
    choice = QUERIED_ATTENTION.choose(OpCall(query.device.type, query.dtype))
    if choice.provider == REFERENCE:
        raise Declined(node, f"attention is computed for all queries: {choice.declined[0][1]}")
    if casts.get(query.device.type, {}).get(node.name) is not None:
        raise Declined(node, "autocast casts its operands")
    if argument(node, "dropout_p", 0.0):
        raise Declined(node, "its weights are dropped out")
    widths = {size_expression(each.shape[-1]) for each in (query, key, value)}
    lengths = {size_expression(each.shape[2]) for each in (query, key, value)}
    if len(widths) > 1 or len(lengths) > 1 or len({query.dtype, key.dtype, value.dtype}) > 1:
        raise Declined(node, "queries, keys and values differ in width, dtype or number of tokens")
    if query.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        raise Declined(node, f"the fused kernel does not compute {query.dtype}")
    mask = tensor_value(argument(node, "attn_mask"))
    if mask is not None and (mask.dim() != 4 or mask.requires_grad):
        raise Declined(node, "its mask is not of (batch, heads, tokens, tokens), or is trained")
    if mask is not None and [size_expression(each) for each in mask.shape[2:]] != [*lengths, *lengths]:
        raise Declined(node, "its mask is not one of each query and each key")
    return choice.provider
