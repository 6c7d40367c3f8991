"""Find feed-forward blocks: in-projections of one input, an elementwise region, one out-projection.

    %gate = <projection>(%x)                      %up = <projection>(%x)
    %act  = silu(%gate)                           %h  = gelu(%up)
    %h    = mul(%act, %up)                        %y  = <projection>(%h)
    %y    = <projection>(%h)

Gate and up may be the parts of one fused layer (`fused_parts`).

The search goes backwards from the out-projection: every path from its input leads through elementwise ops to
projections that read one tensor. It looks at no names of modules, and takes any activation. What must hold:

* the in-projections are as wide as the out-projection's input, and read the same x;
* the region is closed: nothing outside reads an in-projection's output or an intermediate;
* a tensor from outside that enters the region has one value a channel (a learned scale), or one in all.

Declines when: one of these does not hold. The reason names the node that is in the way.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from sparse_compile.graph.declined import Declined
from sparse_compile.graph.facts import Rejection
from sparse_compile.graph.read import hinted_shape, nodes_by_name
from sparse_compile.graph.sites import FFNSite, Projection
from sparse_compile.graph.walk import reach
from sparse_compile.passes.context import PassContext
from sparse_compile.passes.protocol import Pass, PassOutcome
from sparse_compile.passes.read.elementwise import is_elementwise, tensor_operands
from sparse_compile.passes.read.fused_parts import fused_parts, unread_parts
from sparse_compile.passes.read.head_layout import initial_layout
from sparse_compile.passes.read.projections import read_by, site_name


class FindFFN(Pass):
    """Record every feed-forward block in `ctx.facts.ffn_sites`."""

    requires = ("projections",)
    ensures = ("ffn",)
    analysis = True

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassOutcome:
        """Read the graph."""
        nodes = nodes_by_name(gm.graph)
        order = {node: position for position, node in enumerate(gm.graph.nodes)}
        by_output = {nodes[projection.output]: projection for projection in ctx.facts.projections.values()}
        for projection in ctx.facts.projections.values():
            for part in fused_parts(projection, nodes):
                if part.layout == initial_layout(nodes[part.projection.output]):
                    by_output[nodes[part.projection.output]] = part.projection
        sites: list[FFNSite] = []
        rejections: list[Rejection] = []
        for projection in ctx.facts.projections.values():
            try:
                found = _match(projection, by_output, nodes, order, len(sites))
            except Declined as declined:
                rejections.append(declined.by(self.name))
                continue
            if found is not None:
                sites.append(found)
        ctx.facts = replace(ctx.facts, ffn_sites=tuple(sites))
        return PassOutcome(False, {"sites": len(sites)}, tuple(rejections))


def _match(
    projection: Projection,
    by_output: dict[fx.Node, Projection],
    nodes: dict[str, fx.Node],
    order: dict[fx.Node, int],
    index: int,
) -> FFNSite | None:
    """Return the block that ends in `projection`, or None where nothing suggests one.

    Raises:
        Declined: it nearly is one.
    """
    hidden = nodes[projection.source]

    def is_vector(node: fx.Node) -> bool:
        return node is not hidden and node not in by_output and _is_vector(node, projection.in_features)

    def operands(node: fx.Node) -> list[fx.Node]:
        ends = node in by_output or is_vector(node) or not is_elementwise(node)
        return [] if ends else tensor_operands(node)

    met = reach([hidden], operands)
    vectors = {node for node in met if is_vector(node)}
    region = sorted((node for node in met if node not in by_output and node not in vectors), key=order.__getitem__)
    inputs = tuple(sorted((by_output[node] for node in met if node in by_output), key=lambda it: order[nodes[it.base]]))
    # Every product that follows a norm or an attention ends here; only a mixed case is a near miss.
    if not inputs or not region or not all(map(is_elementwise, region)):
        return None
    _check_block(projection, inputs, region, nodes)
    return FFNSite(
        name=site_name((*inputs, projection)),
        index=index,
        source=inputs[0].source,
        inputs=inputs,
        output=projection,
        region=tuple(node.name for node in region),
        vectors=tuple(sorted(node.name for node in vectors)),
    )


def _is_vector(node: fx.Node, channels: int) -> bool:
    """Tell whether `node` holds one value, or one a channel in its last dimension."""
    shape = hinted_shape(node)
    return shape == () or (
        node.op in ("placeholder", "get_attr") and set(shape[:-1]) <= {1} and shape[-1] in (1, channels)
    )


def _check_block(
    output: Projection, inputs: tuple[Projection, ...], region: list[fx.Node], nodes: dict[str, fx.Node]
) -> None:
    """Decline a block whose in-projections do not fit, or of which something else reads a part."""
    if len({projection.source for projection in inputs}) > 1:
        raise Declined(output.name, "its in-projections read different tensors")
    for projection in inputs:
        if projection.out_features != output.in_features:
            widths = f"{projection.out_features} wide, the block's intermediate {output.in_features}"
            raise Declined(output.name, f"{projection.name} is {widths}")
        if projection.fused is not None and (missing := unread_parts(projection.layer, inputs)):
            reason = f"{projection.layer.name} is fused with {missing} more channels than the block reads"
            raise Declined(output.name, reason)
    inside = {*region, *read_by(output, nodes)}
    for node in (*region, *(nodes[projection.output] for projection in inputs)):
        strangers = [user for user in node.users if user not in inside]
        if strangers:
            raise Declined(output.name, f"its intermediate {node.name} is also read by {strangers[0].name}")
