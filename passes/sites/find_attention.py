"""Find attention blocks: query, key and value projections of one input, softmax attention, one output projection.

    %q, %k, %v = <projections>(%x)                                    %w = softmax(%q @ %k^T * s + mask)
    %a = scaled_dot_product_attention(heads(%q), heads(%k), heads(%v))    or    %a = %w @ heads(%v)
    %y = <projection>(merge_heads(%a))

The views, transposes and repetitions between the projections and the attention tell the geometry of the heads
(`head_layout`): how many there are, which feature of a projection is which channel of which head, and that query head h
reads key/value head h // groups. Query, key and value may be parts of one fused layer (`fused_parts`). Rotary
embeddings and norms over a head's channels may lie in between.

Declines when: the projections read different tensors (cross-attention), something else reads a query, key or value (the
cache that a graph returns is allowed), or the layout cannot be followed. The reason names the node that is in the way.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import fx

from sparse_compile.graph.declined import Declined
from sparse_compile.graph.facts import Rejection
from sparse_compile.graph.read import argument, calls_torch, hinted_shape, nodes_by_name, op_name, tensor_value
from sparse_compile.graph.sites import AttentionSite, Projection
from sparse_compile.graph.vocabulary import CASTS, MATMULS, SOFTMAXES
from sparse_compile.graph.walk import reach
from sparse_compile.passes.context import PassContext
from sparse_compile.passes.protocol import Pass, PassOutcome
from sparse_compile.passes.read.elementwise import is_elementwise, tensor_operands
from sparse_compile.passes.read.fused_parts import fused_parts, unread_parts
from sparse_compile.passes.read.head_layout import GROUP, Axis, Layout, follow, initial_layout, origin
from sparse_compile.passes.read.projections import read_by, site_name


@dataclass(frozen=True)
class _Attention:
    """The operands of one attention, however it is spelt."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    result: fx.Node
    key_transposed: bool


class FindAttention(Pass):
    """Record every attention block in `ctx.facts.attention_sites`."""

    requires = ("projections",)
    ensures = ("attention",)
    analysis = True

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassOutcome:
        """Read the graph."""
        nodes = nodes_by_name(gm.graph)
        matcher = _Matcher(
            nodes=nodes,
            order={node: position for position, node in enumerate(gm.graph.nodes)},
            by_output={nodes[projection.output]: projection for projection in ctx.facts.projections.values()},
        )
        for projection in ctx.facts.projections.values():
            matcher.by_source.setdefault(nodes[projection.source], []).append(projection)
        sites: list[AttentionSite] = []
        rejections: list[Rejection] = []
        for node in gm.graph.nodes:
            attention = _sdpa(node) or _softmax_attention(node)
            if attention is None:
                continue
            try:
                sites.append(matcher.match(attention, len(sites)))
            except Declined as declined:
                rejections.append(declined.by(self.name, at=node))
        ctx.facts = replace(ctx.facts, attention_sites=tuple(sites))
        return PassOutcome(False, {"sites": len(sites)}, tuple(rejections))


def _sdpa(node: fx.Node) -> _Attention | None:
    if op_name(node) != "scaled_dot_product_attention":
        return None
    query, key, value = (argument(node, name) for name in ("query", "key", "value"))
    return _Attention(query, key, value, node, key_transposed=False)


def _softmax_attention(node: fx.Node) -> _Attention | None:
    """Match `softmax(q @ k^T ...) @ v` around a softmax node: scaling, masking, casts and dropout may come between."""
    if op_name(node) not in SOFTMAXES or not calls_torch(node):
        return None
    scores = argument(node, "input")
    while isinstance(scores, fx.Node) and op_name(scores) not in MATMULS:
        if not (is_elementwise(scores) or op_name(scores) in ("masked_fill", "where")):
            return None
        operands = [operand for operand in tensor_operands(scores) if operand.op != "get_attr"]
        inner = [operand for operand in operands if hinted_shape(operand) == hinted_shape(node)]
        if len(inner) > 1:
            # An additive mask of full shape: the scores are the operand that a product leads to.
            inner = [operand for operand in inner if _leads_to_product(operand)]
        if len(inner) != 1:
            return None
        scores = inner[0]
    weights = node
    while len(weights.users) == 1 and is_elementwise(next(iter(weights.users))):
        weights = next(iter(weights.users))
    product = next(iter(weights.users)) if len(weights.users) == 1 else None
    if not isinstance(scores, fx.Node) or product is None or op_name(product) not in MATMULS:
        return None
    if argument(product, "input") is not weights:
        return None
    query, key = (argument(scores, name) for name in ("input", "other"))
    value = argument(product, "other")
    assert isinstance(query, fx.Node)
    assert isinstance(key, fx.Node)
    assert isinstance(value, fx.Node)
    return _Attention(query, key, value, product, key_transposed=True)


def _leads_to_product(node: fx.Node) -> bool:
    while is_elementwise(node):
        node = tensor_operands(node)[0]
    return op_name(node) in MATMULS


@dataclass
class _Matcher:
    nodes: dict[str, fx.Node]
    order: dict[fx.Node, int]
    by_output: dict[fx.Node, Projection]
    by_source: dict[fx.Node, list[Projection]] = field(default_factory=dict)
    part_layouts: dict[fx.Node, Layout] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # What some projection's output reaches; rotary tables and masks are no part of it.
        self.projected = reach(self.by_output, lambda node: node.users)

    def match(self, attention: _Attention, index: int) -> AttentionSite:
        """Return the site around `attention`.

        Raises:
            Declined: it is none.
        """
        ways = self._ways(attention)
        (query, query_cone), (key, key_cone), (value, value_cone) = ways
        inputs = (query, key, value)
        self._check_inputs(inputs, attention)
        key_heads, key_groups = self._kv_heads(key, key_cone, attention.key, transposed=attention.key_transposed)
        value_heads, value_groups = self._kv_heads(value, value_cone, attention.value, transposed=False)
        heads = self._heads(query, query_cone, attention.query)
        for count, groups in ((key_heads, key_groups), (value_heads, value_groups)):
            # With enable_gqa the attention itself repeats: query head h reads key/value head h // groups.
            if heads % count or groups not in (1, heads // count):
                reason = f"{heads} query heads over {count} key/value heads repeated {groups} times"
                raise Declined(attention.result, reason)
        if key_heads != value_heads:
            raise Declined(attention.result, "keys and values have different numbers of heads")
        width, read = value.out_features // value_heads, hinted_shape(attention.value)[-1]
        if width != read:
            reason = f"{value.name}: its heads are {width} wide, those that attention reads {read}"
            raise Declined(attention.value, reason)
        output = self._output_of(attention, value, heads)
        starts = [self.nodes[projection.output] for projection in inputs if projection.fused is not None]
        self._check_closed((starts, query_cone, key_cone, value_cone), attention)
        return AttentionSite(
            name=site_name((query, key, value, output)),
            index=index,
            source=query.source,
            query=query,
            key=key,
            value=value,
            output=output,
            attention=attention.result.name,
            kv_heads=key_heads,
            groups=heads // key_heads,
            head_dim=query.out_features // heads,
            value_head_dim=value.out_features // value_heads,
        )

    def _ways(self, attention: _Attention) -> list[tuple[Projection, list[fx.Node]]]:
        """Return the projections of query, key and value, each with the nodes between it and the attention."""
        operands = (attention.query, attention.key, attention.value)
        ways = [self._projection_of(operand, self.by_output) for operand in operands]
        if len({projection.base for projection, _ in ways}) < 3:
            sources = self._with_parts([projection for projection, _ in ways])
            ways = [self._projection_of(operand, sources) for operand in operands]
        return ways

    def _check_inputs(self, inputs: tuple[Projection, Projection, Projection], attention: _Attention) -> None:
        """Decline what is not query, key and value of one tensor, and of nothing else."""
        if len({projection.source for projection in inputs}) > 1:
            reason = "query, key and value read different tensors (cross-attention stays dense)"
            raise Declined(attention.result, reason)
        if len({projection.output for projection in inputs}) < 3:
            raise Declined(attention.result, "query, key and value are not three tensors")
        for projection in inputs:
            if unread := unread_parts(projection.layer, inputs):
                reason = f"{projection.layer.name} is fused with {unread} channels that are no part of it"
                raise Declined(projection.layer.output, reason)

    def _with_parts(self, projections: list[Projection]) -> dict[fx.Node, Projection]:
        """Return the outputs of projections, the parts of those that occur more than once in place of their whole."""
        sources = dict(self.by_output)
        for projection in projections:
            if sum(other.base == projection.base for other in projections) < 2:
                continue
            parts = fused_parts(projection, self.nodes)
            if not parts:
                kind = "with a DoRA adapter" if projection.dora else "whose split into rows cannot be followed"
                reason = f"query, key and value are one fused projection, {projection.name}, {kind}"
                raise Declined(projection.output, reason)
            sources.pop(self.nodes[projection.output], None)
            for part in parts:
                sources[self.nodes[part.projection.output]] = part.projection
                self.part_layouts[self.nodes[part.projection.output]] = part.layout
        return sources

    def _projection_of(self, operand: fx.Node, sources: dict[fx.Node, Projection]) -> tuple[Projection, list[fx.Node]]:
        """Walk back from an operand of the attention to the one projection it comes from; return it and the way."""
        met = reach([operand], lambda node: [] if node in sources else self._projected_operands(node))
        found = [sources[node] for node in met if node in sources]
        if len(found) != 1:
            names = ": " + ", ".join(projection.name for projection in found) if found else ""
            raise Declined(operand, f"{operand.name} comes from {len(found)} frozen projections{names}")
        return found[0], sorted((node for node in met if node not in sources), key=self.order.__getitem__)

    def _projected_operands(self, node: fx.Node) -> list[fx.Node]:
        return [operand for operand in tensor_or_tuple_operands(node) if operand in self.projected]

    def _layout(self, projection: Projection, way: list[fx.Node], operand: fx.Node) -> Layout:
        start = self.nodes[projection.output]
        layouts = {start: self.part_layouts.get(start) or initial_layout(start)}
        follow(layouts, way)
        return layouts[operand]

    def _heads(self, projection: Projection, way: list[fx.Node], operand: fx.Node) -> int:
        heads, groups = self._kv_heads(projection, way, operand, transposed=False)
        if groups != 1:
            raise Declined(operand, f"the query heads of {projection.name} are repeated")
        return heads

    def _kv_heads(
        self, projection: Projection, way: list[fx.Node], operand: fx.Node, *, transposed: bool
    ) -> tuple[int, int]:
        """Return the number of heads of a projection, and how often each is repeated (the copies side by side)."""
        layout = self._layout(projection, way, operand)
        if len(layout) != 4:
            dimensions = f"{len(layout)} dimensions, not (batch, heads, tokens, channels)"
            raise Declined(operand, f"{operand.name} has {dimensions}")
        channels = layout[2 if transposed else 3]
        if any(not origin(axis).startswith("c") for axis in channels):
            raise Declined(operand, f"the last dimension of {operand.name} is not a head's channels")
        heads = [axis for axis in layout[1] if axis.label != GROUP]
        groups = [axis for axis in layout[1] if axis.label == GROUP]
        if layout[1] != (*heads, *groups):
            raise Declined(operand, f"key/value heads are tiled, not repeated in place, in {operand.name}")
        if len(heads) > 1 or len(groups) > 1 or any(origin(axis) != "c.0" for axis in heads):
            raise Declined(operand, f"the heads of {projection.name} are not its outer feature dimension")
        return heads[0].size if heads else 1, groups[0].size if groups else 1

    def _output_of(self, attention: _Attention, value: Projection, heads: int) -> Projection:
        """Walk on from the attention to the projection that reads its merged heads."""
        shape = hinted_shape(attention.result)
        sizes = dict(zip(("t0", "h", "t1", "d"), shape, strict=True))
        layout: Layout = tuple((Axis(label, size),) if size != 1 else () for label, size in sizes.items())
        layouts = {attention.result: layout}
        node = attention.result
        while node not in self.by_source:
            users = self._without_adapters([user for user in node.users if user.op != "output"])
            if len(users) != 1:
                raise Declined(node, f"the attention result {node.name} is read {len(users)} times")
            node = users[0]
            follow(layouts, [node])
        readers = self.by_source[node]
        if len(readers) != 1:
            raise Declined(node, f"{len(readers)} projections read the attention result")
        expected = tuple(axis for axis in (*layout[1], *layout[3]))
        if tuple(layouts[node][-1]) != expected or readers[0].in_features != heads * shape[-1]:
            raise Declined(node, f"{readers[0].name} does not read the heads side by side")
        return readers[0]

    def _without_adapters(self, users: list[fx.Node]) -> list[fx.Node]:
        """Return the cast that a layer alone reads, where all other readers of what is cast are its own adapters."""
        casts = [user for user in users if op_name(user) in CASTS and len(self.by_source.get(user, ())) == 1]
        if len(casts) != 1:
            return users
        own = read_by(self.by_source[casts[0]][0], self.nodes)
        return casts if all(user in own for user in users if user is not casts[0]) else users

    def _check_closed(self, ways: tuple[list[fx.Node], ...], attention: _Attention) -> None:
        inside = {node for way in ways for node in way}
        for node in inside:
            for user in node.users:
                if user in inside or user.op == "output" or user is attention.result:
                    continue
                if not self._inside_attention(user, attention):
                    raise Declined(node, f"{node.name} is also read by {user.name}")

    def _inside_attention(self, node: fx.Node, attention: _Attention) -> bool:
        """Tell whether `node` is the score product of a written-out attention."""
        return attention.key_transposed and {attention.query, attention.key} <= set(node.all_input_nodes)


def tensor_or_tuple_operands(node: fx.Node) -> list[fx.Node]:
    """Return the operands that hold tensors or tuples of tensors (the parts of a split)."""
    return [
        operand
        for operand in node.all_input_nodes
        if tensor_value(operand) is not None or isinstance(operand.meta.get("example_value"), tuple | list)
    ]
