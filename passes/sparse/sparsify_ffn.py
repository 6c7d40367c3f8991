"""Compute the planned feed-forward blocks densely for output tokens, and for context tokens in few channels or none.

    %h = act(gate(%x)) * up(%x)          %x_o, %x_c = take_rows(%x, %output_rows, %context_rows)
    %y = down(%h)                 ->     %y_o = down(act(gate(%x_o)) * up(%x_o))
                                         %y_c = down[:, kept](act(gate[kept](%x_c)) * up[kept](%x_c))
                                         %y   = put_rows(%y_o, %y_c, %output_rows, %context_rows)

An adapter has the channels of its layer: gate and up use the kept rows of B, down uses the kept columns of A. The
product of gate's or up's input with A runs on all tokens, before the split: so a dropout in front of it stays as drawn.
The elementwise region is copied for each role; for context tokens, a vector with one value a channel is gathered. A
DoRA adapter on gate or up scales the channels, and takes the bias off before: its scale and the bias are gathered too.
If it has a frozen product of its own, that is computed as the base product is. Where gate and up are one layer, one
product computes the kept rows of both, those of gate first.

Where a recipe has a map for the block, no channel is kept: it stands in the place of the whole block.

                                         %t   = linear(%x_c, %Q)
                                         %y_c = linear(%t, %U, %b)

Approximate by intent (SparseLoRA, arXiv 2506.16500, section 3): for context tokens, the intermediate channels that are
not kept count as zero; or the block is the affine map that was fitted to it. The gradients are the exact gradients of
that function; those of a map may be left out by an option (`surrogate_gradient`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from sparse_compile.graph.facts import SitePlan
from sparse_compile.graph.read import argument, hinted_shape, tensor_value
from sparse_compile.graph.rewrite import Rewriter, take_over
from sparse_compile.graph.sites import FFNSite, Projection
from sparse_compile.graph.vocabulary import LINEAR
from sparse_compile.passes.context import PassContext
from sparse_compile.passes.protocol import Numerics, Pass, PassOutcome
from sparse_compile.passes.write.affine_map import insert_map, observe_rows
from sparse_compile.passes.write.sparse_rows import SparseRows


class SparsifyFFN(Pass):
    """Rewrite the FFN sites of the plan."""

    requires = ("predictors",)
    ensures = ("sparse",)
    numerics = Numerics.APPROXIMATE
    sparsifies = "ffn"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassOutcome:
        """Rewrite the graph in place."""
        plans = [plan for plan in ctx.facts.plan.sparse_sites if isinstance(plan.site, FFNSite) and not plan.left]
        if not plans:
            return PassOutcome(False)
        rewriter = Rewriter(gm, self.name)
        stats = {
            "sites": len(plans),
            "mapped": sum(plan.mapped for plan in plans),
            "erased": sum(_rewrite(plan, rewriter, ctx) for plan in plans),
            "inserted": rewriter.inserted,
        }
        return PassOutcome(True, stats)


def _rewrite(plan: SitePlan, rewriter: Rewriter, ctx: PassContext) -> int:
    site = plan.site
    assert isinstance(site, FFNSite)
    rows = SparseRows(rewriter, ctx)
    nodes = rows.nodes
    end, source = nodes[site.output.output], nodes[site.source]
    with rewriter.before(end, site.name):
        output = _Segment(rows, site)
        sparse = None if plan.mapped else _Segment(rows, site, nodes[ctx.facts.selections[site.identity][0]])
        splits = {source: rows.split(source)}
        for projection in site.inputs:
            whole = [nodes[branch.a] for branch in projection.adapters]
            whole += [argument(nodes[name], "input") for name in projection.products[1:]]
            splits |= {node: rows.split(node) for node in whole if node not in splits}
        output.values |= {node: parts[0] for node, parts in splits.items()}
        dense = output.run()
        if sparse is None:
            if plan.online:
                observe_rows(plan, rows, output.values[source], dense, ctx)
            context = insert_map(plan, rows, splits[source][1], ctx)
        else:
            sparse.values |= {node: parts[1] for node, parts in splits.items()}
            context = sparse.run()
        merged = rows.merge(dense, rows.cast_like(context, dense), source, site.output.out_features)
    return take_over(end, merged)


class _Segment:
    """Copies a site's nodes for the tokens of one role.

    Args:
        rows: what inserts nodes.
        site: the site.
        kept: node that holds the kept channels; None computes all of them (output tokens).
    """

    def __init__(self, rows: SparseRows, site: FFNSite, kept: fx.Node | None = None) -> None:
        self.rows = rows
        self.site = site
        self.kept = kept
        self.values: dict[fx.Node, fx.Node] = {}
        self._order = {node: position for position, node in enumerate(rows.rewriter.graph.nodes)}

    def run(self) -> fx.Node:
        """Insert the segment; return the node that holds its result, (tokens, out)."""
        nodes = self.rows.nodes
        parts: dict[Projection, list[Projection]] = {}
        for projection in self.site.inputs:
            parts.setdefault(projection.layer, []).append(projection)
        for layer, members in parts.items():
            self._run_input(layer, members)
        for name in self.site.vectors:
            self._take_vector(nodes[name], self.site.channels, self.kept)
        for name in self.site.region:
            self._copy(nodes[name])
        last = self.site.output
        hidden = self.values[nodes[last.source]]
        if self.kept is None:
            self._copy(nodes[last.base])
        else:
            self.values[nodes[last.base]] = self.rows.gathered_input(hidden, nodes[last.base], last, self.kept)
        self._copy_adapters(last, self.kept, gather_outputs=False)
        return self.values[nodes[last.output]]

    def _run_input(self, layer: Projection, parts: Sequence[Projection]) -> None:
        """Insert an in-projection, or a layer whose parts are several of them, side by side."""
        nodes, base, kept = self.rows.nodes, self.rows.nodes[layer.base], None
        if self.kept is None:
            self._copy(base)
        else:
            kept = self.rows.layer_channels([(part, self.kept) for part in parts])
            self.values[base] = self.rows.gathered(self.values[nodes[self.site.source]], base, layer, kept)
        self._copy_adapters(layer, kept, gather_outputs=True)
        width = self.site.channels if self.kept is None else int(argument(self.kept, "k"))
        for part in parts:
            if part.fused is not None:
                start = part.fused.offset // self.site.channels * width
                narrow = self.rows.rewriter.method("narrow", self.values[nodes[layer.output]], -1, start, width)
                self.values[nodes[part.output]] = narrow

    def _copy(self, node: fx.Node) -> None:
        if node not in self.values:
            self.values[node] = self.rows.dense(node, self.values)

    def _copy_adapters(self, projection: Projection, kept: fx.Node | None, *, gather_outputs: bool) -> None:
        """Copy what lies between a base product and the projection's output: adapters, scales, casts, additions.

        Args:
            projection: the layer.
            kept: node that holds the kept rows of its weight, or columns of the out-projection's; None for all.
            gather_outputs: whether rows are kept.
        """
        nodes = self.rows.nodes
        gathered = {nodes[branch.b if gather_outputs else branch.a] for branch in projection.adapters}
        products = {nodes[name] for name in projection.products[1:]}
        channels = projection.out_features if gather_outputs else None
        between = self._between(projection)
        for node in between:
            if node.target is not LINEAR:
                for operand in node.all_input_nodes:
                    if operand not in self.values and operand not in between and _is_per_channel(operand):
                        self._take_vector(operand, channels, kept)
                self._copy(node)
            elif kept is None or node not in gathered | products:
                self._copy(node)
            elif node in products:
                product = self.rows.gathered if gather_outputs else self.rows.gathered_input
                x = self.values[argument(node, "input")]
                self.values[node] = product(x, node, projection, kept)
            else:
                self.values[node] = self._gathered_adapter(node, kept, dim=0 if gather_outputs else 1)

    def _between(self, projection: Projection) -> list[fx.Node]:
        """Return the nodes on the way from the segment's values to the projection's output, in graph order.

        What depends on no token (a weight that is cast before its product) is not among them: both segments read it.
        """
        on_the_way: dict[fx.Node, bool] = {}

        def visit(node: fx.Node) -> bool:
            if node in self.values:
                return True
            if node not in on_the_way:
                on_the_way[node] = max([visit(operand) for operand in node.all_input_nodes], default=False)
            return on_the_way[node]

        visit(self.rows.nodes[projection.output])
        return sorted((node for node, found in on_the_way.items() if found), key=self._order.__getitem__)

    def _gathered_adapter(self, node: fx.Node, kept: fx.Node, dim: int) -> fx.Node:
        """Insert an adapter's product with the kept rows (dim 0) or columns (dim 1) of its factor."""
        assert node.target is LINEAR
        call = self.rows.rewriter.call
        x, weight, bias = (argument(node, name) for name in ("input", "weight", "bias"))
        width = hinted_shape(weight)[-1] if dim == 0 else int(argument(kept, "k"))
        weight = call(torch.index_select, weight, dim, kept)
        if bias is not None and dim == 0:
            bias = call(torch.index_select, bias, 0, kept)
        return self.rows.product(self.values[x], weight, bias, width)

    def _take_vector(self, node: fx.Node, channels: int | None, kept: fx.Node | None) -> None:
        """Take the kept ones of a tensor of one value a channel; `channels` is None where all of them are read."""
        shape = hinted_shape(node)
        if kept is not None and shape and shape[-1] == channels:
            self.values[node] = self.rows.rewriter.call(torch.index_select, node, len(shape) - 1, kept)
        # For flattened tokens a vector's leading dimensions of size 1 must go, or the result would gain dimensions.
        if len(shape) > 2:
            self.values[node] = self.rows.rewriter.method("reshape", self.values.get(node, node), -1)


def _is_per_channel(node: fx.Node) -> bool:
    """Tell whether a node holds a tensor that is one row at most."""
    return tensor_value(node) is not None and set(hinted_shape(node)[:-1]) <= {1}
