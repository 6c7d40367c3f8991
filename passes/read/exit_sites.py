"""Find the sites behind a block at which context tokens are to leave the residual stream."""

from __future__ import annotations

from torch import fx

from sparse_compile.graph.declined import Declined
from sparse_compile.graph.read import nodes_by_name
from sparse_compile.graph.sites import Site
from sparse_compile.graph.walk import reach
from sparse_compile.passes.context import PassContext
from sparse_compile.passes.read.loss_segment import find_loss_segment
from sparse_compile.passes.read.residual_stream import block_input
from sparse_compile.passes.read.row_wise import sizes_of


def sites_behind_exit(graph: fx.Graph, ctx: PassContext, block: int) -> tuple[Site, ...]:
    """Return the sites behind the exit, its own block included, in the order of the graph.

    Args:
        graph: the canonical graph.
        ctx: sites and roles.
        block: the attention block before which context leaves, counted from 0.

    Raises:
        Declined: the graph is none that context can leave.
    """
    config, roles = ctx.env.config, ctx.facts.roles
    if ctx.env.stack != (0, 1):
        raise Declined("graph", "the model is compiled in parts, and context leaves for the rest of the whole")
    if "exit_context" in config.disable:
        raise Declined("graph", "exit_context is disabled")
    if roles is None or roles.origin != "cross_entropy":
        raise Declined("graph", "the loss is not in the graph, so nothing shows that it reads output tokens alone")
    if config.token_selection != "roles":
        raise Declined("graph", f"token_selection={config.token_selection!r} leaves rows of the loss in the context")
    if "select_loss_rows" in config.disable:
        raise Declined("graph", "select_loss_rows is disabled, so the end of the model is computed for all tokens")
    find_loss_segment(graph, ctx)  # or declined: something reads the logits of all tokens
    nodes = nodes_by_name(graph)
    inputs = [block_input(site, nodes) for site in ctx.facts.attention_sites[block:]]
    widths = {width for each in inputs for width in (sizes_of(each.stream)[-1], each.site.query.in_features)}
    if len(widths) > 1:
        raise Declined(inputs[0].site.name, "the residual stream, or its norm, changes its width behind it")
    before = reach([inputs[0].stream], lambda node: node.all_input_nodes)
    ffn = (site for site in ctx.facts.ffn_sites if nodes[site.output.output] not in before)
    places = {node.name: place for place, node in enumerate(graph.nodes)}
    return tuple(sorted((*(each.site for each in inputs), *ffn), key=lambda site: places[site.output.base]))
