"""Rewrite the FX graphs that Dynamo hands over."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, count, takewhile
from typing import Any

from torch import Tensor, fx
from torch.fx.node import Argument
from torch.utils.checkpoint import CheckpointPolicy

from sparse_compile.graph.modes import switches_in_force, switches_modes
from sparse_compile.graph.vocabulary import TAG
from sparse_compile.torch_private.dynamo import copy_dynamo_attributes, register_graph_buffer, take_source
from sparse_compile.torch_private.fake import StandIns
from sparse_compile.torch_private.fx import is_erased, keep_used_names, uncompiled_graph_module


def copy_graph_module(gm: fx.GraphModule) -> fx.GraphModule:
    """Copy a GraphModule so that the copy's graph can be rewritten: same node names and metadata, shared attributes.

    A name that the graph has given up is given to no node of the copy.
    """
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        copied = graph.node_copy(node, mapping.__getitem__)
        copied.meta = dict(node.meta)
        take_source(copied, node)
        mapping[node] = copied
    assert [node.name for node in graph.nodes] == [node.name for node in gm.graph.nodes], "a copy keeps node names"
    # Facts name nodes: a name that was given up must not come to mean another node.
    keep_used_names(gm.graph, graph)
    copied_module = uncompiled_graph_module(gm, graph, type(gm).__name__)
    copy_dynamo_attributes(gm, copied_module)
    return copied_module


class Rewriter:
    """Inserts nodes into a graph, tagged with the pass and site they come from.

    Each inserted node is evaluated on the stand-ins of the graph, so that its value (shape, dtype, device) is known as
    that of a captured node is. What a pass changes in place it has evaluated again (`reevaluate`).

    Args:
        gm: the module whose graph is rewritten.
        pass_name: recorded in `node.meta["sparselora"]`.
    """

    def __init__(self, gm: fx.GraphModule, pass_name: str) -> None:
        self.gm = gm
        self.graph = gm.graph
        self.pass_name = pass_name
        self.inserted = 0
        self._site = ""
        self._anchor: fx.Node | None = None
        self._stand_ins = StandIns(gm)
        self._has_switches = switches_modes(gm.graph)
        self._switches: list[fx.Node] = []

    @contextmanager
    def before(self, anchor: fx.Node, site: str = "") -> Iterator[None]:
        """Insert before `anchor`; new nodes take over its stack trace, module stack and checkpoint tags."""
        previous = self._anchor, self._site, self._switches
        self._anchor, self._site = anchor, site or self._site
        self._switches = switches_in_force(anchor) if self._has_switches else []
        try:
            with self.graph.inserting_before(anchor):
                yield
        finally:
            self._anchor, self._site, self._switches = previous

    def call(self, target: Callable[..., Any], *args: Argument, **kwargs: Argument) -> fx.Node:
        """Insert a function call."""
        return self._tagged(self.graph.call_function(target, args, kwargs))

    def method(self, name: str, *args: Argument, **kwargs: Argument) -> fx.Node:
        """Insert a tensor-method call."""
        return self._tagged(self.graph.call_method(name, args, kwargs))

    def items(self, node: fx.Node, count: int) -> tuple[fx.Node, ...]:
        """Insert the `getitem` nodes of a call that returns a tuple."""
        return tuple(self.call(operator.getitem, node, index) for index in range(count))

    def buffer(self, name: str, value: Tensor) -> fx.Node:
        """Insert a read of a tensor constant of the graph, which is registered on the first use.

        Args:
            name: what to call the constant; a number is added where something else has the name.
            value: the constant.
        """
        names = chain((name,), (f"{name}_{number}" for number in count(1)))
        free = next(each for each in names if getattr(self.gm, each, value) is value)
        if not hasattr(self.gm, free):
            register_graph_buffer(self.gm, free, value)
        return self._tagged(self.graph.get_attr(free))

    def copy(self, node: fx.Node, arg_map: Callable[[fx.Node], fx.Node]) -> fx.Node:
        """Insert a copy of `node` with its node arguments replaced."""
        copied = self.graph.node_copy(node, arg_map)
        copied.meta = {key: value for key, value in node.meta.items() if key != "example_value"}
        return self._tagged(copied)

    def reevaluate(self, node: fx.Node) -> None:
        """Tag a captured node that was changed in place, and record what it holds now."""
        self._sign(node, switches_in_force(node) if self._has_switches else [])

    def _tagged(self, node: fx.Node) -> fx.Node:
        self.inserted += 1
        if self._anchor is not None:
            for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "recompute", "ac_graph_id"):
                if key in self._anchor.meta and key not in node.meta:
                    node.meta[key] = self._anchor.meta[key]
        self._sign(node, self._switches)
        return node

    def _sign(self, node: fx.Node, switches: list[fx.Node]) -> None:
        node.meta[TAG] = {"pass": self.pass_name, "site": self._site}
        node.meta["example_value"] = self._stand_ins.evaluate(node, switches)


def buffer_name(owner: str, part: str) -> str:
    """Return the name of a constant that belongs to a layer or a site: `sparselora_layers_0_mlp_q`."""
    return "_".join(("sparselora", re.sub(r"\W", "_", owner), part))


def forward_to(old: fx.Node, existing: fx.Node) -> None:
    """Give the users of `old` the node `existing`, which holds the same value, and erase `old`."""
    old.replace_all_uses_with(existing)
    old.graph.erase_node(old)


def take_over(old: fx.Node, new: fx.Node) -> int:
    """Put the inserted node `new` in the place of `old`; erase what only `old` used; return how many nodes that were.

    `new` takes over the name as well: facts refer to nodes by name, and diffs between dumps stay small.
    """
    old.replace_all_uses_with(new)
    name = old.name
    erased = erase_unused(old)
    new.name = name
    return erased


def hoist(rewriter: Rewriter, node: fx.Node, copies: dict[fx.Node, fx.Node]) -> fx.Node:
    """Return `node`, or a copy of it and of all it is computed from, at the place of insertion.

    Args:
        rewriter: where to insert.
        node: what is wanted there.
        copies: the copies made so far, which are used again.
    """
    if node.op == "placeholder":
        return node
    if node not in copies:
        for operand in node.all_input_nodes:
            hoist(rewriter, operand, copies)
        copies[node] = rewriter.copy(node, lambda operand: copies.get(operand, operand))
    return copies[node]


def save_for_backward(node: fx.Node) -> None:
    """Mark a call to be saved for the backward, whatever checkpoint it took its marks from."""
    node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    node.meta.pop("ac_graph_id", None)


def save_what_precedes(end: fx.Node) -> None:
    """Mark every call before `end` to be saved for the backward, whatever checkpoint it took its marks from.

    What stands at the top of a graph is of the forward: read again in the backward, roles may have closed, and a
    data-dependent size would be another symbol.
    """
    for node in takewhile(lambda node: node is not end, end.graph.nodes):
        if node.op != "placeholder":
            save_for_backward(node)


def erase_unused(root: fx.Node) -> int:
    """Erase `root` and the calls that only it used.

    Only what is reached from `root` is erased: a call without users elsewhere may have an effect.
    """
    erased = 0
    # No walk of `reach`: a node has no users left only once those before it are erased, so it may be met several times.
    frontier = [root]
    while frontier:
        node = frontier.pop()
        if node.op not in ("call_function", "call_method") or node.users or is_erased(node):
            continue
        operands = node.all_input_nodes
        node.graph.erase_node(node)
        erased += 1
        frontier += operands
    return erased
