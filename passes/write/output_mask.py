"""Insert what tells output tokens from context, and padding from both."""

from __future__ import annotations

import torch
from torch import fx

from sparse_compile.graph.read import hinted_shape, nodes_by_name, tensor_of, tensor_value
from sparse_compile.graph.rewrite import Rewriter, hoist
from sparse_compile.passes.context import PassContext

__all__ = ["insert_output_mask"]

_OPS = torch.ops.sparselora


def insert_output_mask(rewriter: Rewriter, ctx: PassContext, source: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """Insert the roles of the tokens where the rewriter stands: before every node that is no input of the graph.

    Args:
        rewriter: where to insert.
        ctx: where roles come from.
        source: a node over the tokens, (B, S, C) or (B * S, C); what is inserted is on its device.

    Returns:
        (B, S) bool, true at output tokens; (B, S) bool, false at padding, or None where nothing tells.
    """
    roles = ctx.facts.roles
    assert roles is not None
    nodes = nodes_by_name(rewriter.graph)
    device = tensor_of(source).device

    def beside_tokens(node: fx.Node, origin: fx.Node) -> fx.Node:
        """Move what was computed from `origin` to the device of the activations: labels may come on the CPU."""
        value = tensor_value(origin)
        return node if value is None or value.device == device else rewriter.method("to", node, device)

    if roles.origin == "given":
        mask = rewriter.call(_OPS.given_output_mask.default, _token_placeholder(rewriter.graph, ctx, source))
    else:
        masks = []
        for name, shift in roles.labels:
            labels = hoist(rewriter, nodes[name], {})
            found = rewriter.call(_OPS.output_mask.default, labels, roles.ignore_index, shift)
            masks.append(beside_tokens(found, nodes[name]))
        mask = masks[0]
        for other in masks[1:]:
            mask = rewriter.call(torch.logical_or, mask, other)
    attended = nodes[roles.padding] if roles.padding else None
    if attended is not None:
        attended = beside_tokens(rewriter.method("to", attended, torch.bool), attended)
    return mask, attended


def _token_placeholder(graph: fx.Graph, ctx: PassContext, source: fx.Node) -> fx.Node:
    """Return an input of the graph whose first dimensions are those of the tokens."""
    tokens = hinted_shape(source)[:2]
    node: fx.Node
    for node in graph.nodes:
        value = tensor_value(node)
        is_input = node.op == "placeholder" and node.name not in ctx.env.parameters
        if is_input and value is not None and value.dim() >= 2 and hinted_shape(node)[:2] == tokens:
            return node
    raise ValueError("no input of the graph has the shape of the tokens, to check the given roles against")
