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
from sparse_compile.graph.read import hinted_shape, nodes_by_name, op_name, tensor_value
from sparse_compile.graph.sites import AttentionSite, Projection
from sparse_compile.graph.vocabulary import CASTS, LINEAR
from sparse_compile.graph.walk import reach
from sparse_compile.passes.context import PassContext
from sparse_compile.passes.protocol import Pass, PassOutcome
from sparse_compile.passes.read.attention_call import AttentionCall, attention_at
from sparse_compile.passes.read.fused_parts import fused_parts, unread_parts
from sparse_compile.passes.read.head_layout import GROUP, Axis, Layout, follow, initial_layout, origin
from sparse_compile.passes.read.projections import read_by, site_name


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
            attention = attention_at(node)
            if attention is None:
                continue
            try:
                sites.append(matcher.match(attention, len(sites)))
            except Declined as declined:
                rejections.append(declined.by(self.name, at=node))
        ctx.facts = replace(ctx.facts, attention_sites=tuple(sites))
        return PassOutcome(False, {"sites": len(sites)}, tuple(rejections))


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

    def match(self, attention: AttentionCall, index: int) -> AttentionSite:
        """Return the site around `attention`.

        Raises:
            Declined: it is none.
        """
        ways = self._ways(attention)
        (query, query_cone), (key, key_cone), (value, value_cone) = ways
        inputs = (query, key, value)
        self._check_inputs(inputs, attention)
        beside = self._beside(inputs)
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
            beside=beside,
        )

    def _ways(self, attention: AttentionCall) -> list[tuple[Projection, list[fx.Node]]]:
        """Return the projections of query, key and value, each with the nodes between it and the attention."""
        operands = (attention.query, attention.key, attention.value)
        ways = [self._projection_of(operand, self.by_output) for operand in operands]
        bases = [projection.base for projection, _ in ways]
        shared = [each for each, way in ways if bases.count(each.base) > 1 or self._is_part(each, way)]
        if shared:
            (query, _), (key, _), (value, _) = ways
            if key.base == value.base and query.source != key.source:
                reason = f"keys and values are made by {key.name} of latent channels, the query of others: "
                raise Declined(attention.result, f"{reason}latent attention stays dense")
            sources = self._with_parts(shared)
            ways = [self._projection_of(operand, sources) for operand in operands]
        return ways

    def _is_part(self, projection: Projection, way: list[fx.Node]) -> bool:
        """Tell whether a way leads through some parts of a layer and not through all: the others are another thing."""
        inside = [self.nodes[part.projection.output] in way for part in fused_parts(projection, self.nodes)]
        return any(inside) and not all(inside)

    def _check_inputs(self, inputs: tuple[Projection, Projection, Projection], attention: AttentionCall) -> None:
        """Decline what is not query, key and value of one tensor, and of nothing else."""
        if len({projection.source for projection in inputs}) > 1:
            reason = "query, key and value read different tensors (cross-attention stays dense)"
            raise Declined(attention.result, reason)
        if len({projection.output for projection in inputs}) < 3:
            raise Declined(attention.result, "query, key and value are not three tensors")

    def _beside(self, inputs: tuple[Projection, ...]) -> tuple[Projection, ...]:
        """Return the parts of fused layers that are neither query, key nor value: they stay dense."""
        found: list[Projection] = []
        for layer in {each.layer.base: each.layer for each in inputs if each.fused is not None}.values():
            parts = [part.projection for part in fused_parts(layer, self.nodes)]
            found += [part for part in parts if part.output not in {each.output for each in inputs}]
            if unread := unread_parts(layer, (*inputs, *found)):
                raise Declined(layer.output, f"{layer.name} is fused with {unread} channels that are no part of it")
        return tuple(found)

    def _with_parts(self, projections: list[Projection]) -> dict[fx.Node, Projection]:
        """Return the outputs of all projections, of the given ones their parts in place of the whole."""
        sources = dict(self.by_output)
        for projection in {each.base: each for each in projections}.values():
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
        layout = _with_heads_apart(self._layout(projection, way, operand))
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

    def _output_of(self, attention: AttentionCall, value: Projection, heads: int) -> Projection:
        """Walk on from the attention to the projection that reads its merged heads."""
        shape = hinted_shape(attention.result)
        # A product of three dimensions has the heads of all sequences in its first one.
        apart = shape if len(shape) == 4 else (shape[0] // heads, heads, *shape[1:])
        axes = dict(zip(("t0", "h", "t1", "d"), apart, strict=True))
        layout: Layout = tuple((Axis(label, size),) if size != 1 else () for label, size in axes.items())
        layouts = {attention.result: layout if len(shape) == 4 else ((*layout[0], *layout[1]), *layout[2:])}
        node = attention.result
        while node not in self.by_source:
            users = self._without_adapters([user for user in node.users if user.op != "output"])
            region = users if len(users) == 1 else self._until_joined(users)
            if not region:
                raise Declined(node, f"the attention result {node.name} is read {len(users)} times")
            follow(layouts, region)
            node = region[-1]
        readers = self.by_source[node]
        if len(readers) != 1:
            raise Declined(node, f"{len(readers)} projections read the attention result")
        expected = tuple(axis for axis in (*layout[1], *layout[3]))
        if tuple(layouts[node][-1]) != expected or readers[0].in_features != heads * shape[-1]:
            raise Declined(node, f"{readers[0].name} does not read the heads side by side")
        return readers[0]

    def _until_joined(self, readers: list[fx.Node]) -> list[fx.Node]:
        """Return what lies between readers and the call where all their ways meet (a norm); none where they do not."""
        region: list[fx.Node] = []
        pending = set(readers)
        while pending:
            node = min(pending, key=self.order.__getitem__)
            pending.remove(node)
            region.append(node)
            if not pending:
                return region
            if node.op == "output" or node in self.by_source or node.target is LINEAR:
                return []
            pending.update(node.users)
        return []

    def _without_adapters(self, users: list[fx.Node]) -> list[fx.Node]:
        """Return the cast that a layer alone reads, where all other readers of what is cast are its own adapters."""
        casts = [user for user in users if op_name(user) in CASTS and len(self.by_source.get(user, ())) == 1]
        if len(casts) != 1:
            return users
        own = read_by(self.by_source[casts[0]][0], self.nodes)
        return casts if all(user in own for user in users if user is not casts[0]) else users

    def _check_closed(self, ways: tuple[list[fx.Node], ...], attention: AttentionCall) -> None:
        inside = {node for way in ways for node in way}
        for node in inside:
            for user in node.users:
                if user in inside or user.op == "output" or user is attention.result:
                    continue
                if not self._inside_attention(user, attention):
                    raise Declined(node, f"{node.name} is also read by {user.name}")

    def _inside_attention(self, node: fx.Node, attention: AttentionCall) -> bool:
        """Tell whether `node` is the score product of a written-out attention, or feeds this attention alone.

        Values may make a part of the mask: all that reads them reads the sparse ones, as in the masked-dense model.
        """
        if attention.key_transposed and {attention.query, attention.key} <= set(node.all_input_nodes):
            return True
        ahead = reach([node], lambda each: [] if each is attention.result else each.users)
        return attention.result in ahead and all(each.op != "output" for each in ahead)


def _with_heads_apart(layout: Layout) -> Layout:
    """Split the first of three dimensions, (batch * heads, tokens, channels), into batch and heads."""
    if len(layout) != 3:
        return layout
    batch = tuple(axis for axis in layout[0] if origin(axis).startswith("t"))
    heads = layout[0][len(batch) :]
    return (batch, heads, *layout[1:]) if heads and layout[0] == (*batch, *heads) else layout


def tensor_or_tuple_operands(node: fx.Node) -> list[fx.Node]:
    """Return the operands that hold tensors or tuples of tensors (the parts of a split)."""
    return [
        operand
        for operand in node.all_input_nodes
        if tensor_value(operand) is not None or isinstance(operand.meta.get("example_value"), tuple | list)
    ]
