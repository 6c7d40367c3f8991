"""Inline the bodies of activation checkpoints, so that every later pass sees one flat graph.

    %y = tag_activation_checkpoint(%wrap_body_0, %x, %w)     ->     %y = ...body of wrap_body_0...
                                                                    (each node: recompute=PREFER_RECOMPUTE,
                                                                    ac_graph_id=i)

Legal because: it is what the operator itself does while AOTAutograd traces it: it runs the body node by node and marks
each for recomputation; the partitioner reads the marks alone. Nodes that later passes insert take over the marks of the
place they are inserted at, except a choice of channels, which is marked MUST_SAVE: recomputed, a near tie could flip.
Declines when: the user gave the checkpoint a policy of its own (`context_fn`), which only the operator can run.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from sparse_compile.graph.declined import Declined
from sparse_compile.graph.facts import Rejection
from sparse_compile.graph.vocabulary import TAG
from sparse_compile.passes.context import PassContext
from sparse_compile.passes.protocol import Pass, PassOutcome
from sparse_compile.torch_private.autograd import next_checkpoint_id


class InlineCheckpointBodies(Pass):
    """Replace each activation checkpoint by the nodes of its body, marked for recomputation."""

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassOutcome:
        """Rewrite the graph in place."""
        checkpoint = torch.ops.higher_order.tag_activation_checkpoint
        inlined = 0
        rejections: list[Rejection] = []
        # A body may hold checkpoints of its own: they appear in the graph as it is inlined.
        while calls := [
            node
            for node in gm.graph.nodes
            if node.target is checkpoint and node.name not in {rejection.node for rejection in rejections}
        ]:
            call = calls[0]
            try:
                body = _body(gm, call)
            except Declined as declined:
                rejections.append(declined.by(self.name))
                continue
            _inline(gm, call, body, self.name)
            inlined += 1
        return PassOutcome(inlined > 0, {"inlined": inlined}, tuple(rejections))


def _body(gm: fx.GraphModule, call: fx.Node) -> fx.GraphModule:
    """Return the body of a checkpoint; decline one that must be left to the operator."""
    holder = call.args[0]
    body = gm.get_submodule(str(holder.target)) if isinstance(holder, fx.Node) and holder.op == "get_attr" else None
    if not isinstance(body, fx.GraphModule):
        raise Declined(call, "the checkpointed body is not a graph")
    if "_checkpoint_context_fn" in body.meta:
        raise Declined(call, "the checkpoint has a policy of its own (context_fn): sites inside stay dense")
    placeholders = [node for node in body.graph.nodes if node.op == "placeholder"]
    if len(placeholders) != len(call.args) - 1:
        raise Declined(call, "the checkpointed body takes keyword arguments")
    if any(node.op == "get_attr" and not _is_graph(body, node) for node in body.graph.nodes):
        raise Declined(call, "the checkpointed body holds constants of its own")
    return body


def _is_graph(body: fx.GraphModule, node: fx.Node) -> bool:
    value: Any = body
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return isinstance(value, fx.GraphModule)


def _inline(gm: fx.GraphModule, call: fx.Node, body: fx.GraphModule, pass_name: str) -> None:
    region = next_checkpoint_id()
    arguments = iter(call.args[1:])
    values: dict[fx.Node, Any] = {}
    result: Any = None
    with gm.graph.inserting_before(call):
        for node in body.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(arguments)
            elif node.op == "output":
                result = fx.map_arg(node.args[0], values.__getitem__)
            elif node.op == "get_attr":
                values[node] = _move_nested_body(gm, body, node)
                values[node].meta[TAG] = {"pass": pass_name, "site": ""}
            else:
                copied = gm.graph.node_copy(node, values.__getitem__)
                copied.meta = dict(node.meta)
                # An inner checkpoint of a nested pair keeps its own, later id.
                copied.meta.setdefault("recompute", CheckpointPolicy.PREFER_RECOMPUTE)
                copied.meta.setdefault("ac_graph_id", region)
                values[node] = copied
    for user in list(call.users):
        assert user.target is operator.getitem, "a checkpoint returns a tuple"
        user.replace_all_uses_with(result[user.args[1]])
        gm.graph.erase_node(user)
    holder = call.args[0]
    gm.graph.erase_node(call)
    if isinstance(holder, fx.Node) and not holder.users:
        gm.graph.erase_node(holder)


def _move_nested_body(gm: fx.GraphModule, body: fx.GraphModule, node: fx.Node) -> fx.Node:
    name = f"nested_{node.target}"
    while hasattr(gm, name):
        name += "_"
    gm.add_module(name, body.get_submodule(str(node.target)))
    return gm.graph.get_attr(name)
