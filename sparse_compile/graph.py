"""Small helpers for reading and rewriting the FX graphs that Dynamo hands over."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.node import Argument
from torch.utils.checkpoint import CheckpointPolicy

from sparse_compile.torch_private import (
    LINEAR as LINEAR,  # the target of a linear layer, for all who read graphs
)
from sparse_compile.torch_private import (
    copy_dynamo_attributes,
    is_erased,
    is_op,
    overload,
    overload_name,
    size_hint,
    take_source,
)

TAG = "sparselora"
"""Key of `node.meta` under which a rewrite records its pass and site."""

CASTS = frozenset({"to", "type", "float", "double", "half", "bfloat16", "type_as"})
"""Names of the calls that change the dtype (or the device) of a tensor and nothing else."""

TRANSPOSES = frozenset({"t", "transpose", "permute", "swapaxes", "swapdims", "numpy_T", "adjoint"})
"""Names of the calls that may exchange the two dimensions of a matrix."""


def value_of(node: fx.Node) -> Any:
    """Return the example value Dynamo recorded for `node` (a FakeTensor for a tensor), or None."""
    return node.meta.get("example_value")


def tensor_value(node: Any) -> Tensor | None:
    """Return the example tensor of `node`, or None where it is not a node that holds a tensor."""
    value = value_of(node) if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def hinted_shape(node: fx.Node) -> tuple[int, ...]:
    """Return the shape of the tensor `node`, symbolic sizes replaced by their hints, without adding a guard."""
    value = tensor_value(node)
    assert value is not None, f"{node} holds no tensor"
    return tuple(size_hint(size) for size in value.shape)


def op_name(node: fx.Node) -> str:
    """Return the bare name of what `node` calls: `"view"`, `"silu"`, `"add"`; empty for anything but a call."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    if (op := overload(node.target)) is not None:
        return overload_name(op)
    return str(getattr(node.target, "__name__", node.target))


_TENSOR_NAMESPACES = ("torch", "_operator", "operator")


def calls_torch(node: fx.Node) -> bool:
    """Tell whether `node` is a method of a tensor or a function of PyTorch, whose name then says what it does."""
    if node.op == "call_method":
        return tensor_value(node.args[0]) is not None if node.args else False
    if node.op != "call_function":
        return False
    if is_op(node.target):
        return True
    module = getattr(node.target, "__module__", None) or ""
    # Builtins of torch (torch.matmul, torch._C._nn.gelu) report no module or a private one.
    return module.split(".")[0] in _TENSOR_NAMESPACES or torch.overrides.is_tensor_method_or_property(
        cast("Callable[..., Any]", node.target)
    )


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """Return an argument of a call, given by position or by name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def strip_casts(node: fx.Node) -> fx.Node:
    """Follow dtype casts back to what they cast."""
    while calls_torch(node) and op_name(node) in CASTS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def strip_transposes(node: fx.Node) -> tuple[fx.Node, int]:
    """Follow transposes of a matrix back to what they transpose; return it and their number."""
    count = 0
    while True:
        is_transpose = (calls_torch(node) and op_name(node) in TRANSPOSES) or (
            node.target is getattr and node.args[1] in ("T", "mT")
        )
        value = tensor_value(node)
        if not is_transpose or value is None or value.dim() != 2:
            return node, count
        source = node.args[0]
        assert isinstance(source, fx.Node)
        source_value = tensor_value(source)
        if source_value is None or source_value.dim() != 2:
            return node, count
        # `permute(0, 1)` and `transpose(0, 0)` move nothing.
        count += _swaps(node)
        node = source


def _swaps(node: fx.Node) -> int:
    """Return 1 where `node` exchanges the two dimensions, 0 where it moves nothing."""
    if op_name(node) == "permute":
        order: Any = argument(node, 1, "dims")
        if isinstance(order, int):
            order = node.args[1:]
        return int([dim % 2 for dim in order] == [1, 0])
    if op_name(node) in ("transpose", "swapaxes", "swapdims"):
        # `transpose` names its dimensions dim0 and dim1, `swapaxes` axis0 and axis1.
        first, second = (*node.args[1:], *node.kwargs.values())
        return int(first % 2 != second % 2)  # type: ignore[operator]
    return 1


def stored_matrix(node: fx.Node) -> tuple[fx.Node, bool]:
    """Follow casts, detaches and transposes of a matrix back to what is stored; tell whether that is the transpose."""
    count = 0
    while True:
        matrix, transposes = strip_transposes(strip_casts(node))
        count += transposes
        if op_name(matrix) == "detach" and isinstance(matrix.args[0], fx.Node):
            matrix = matrix.args[0]
        if matrix is node:
            return node, count % 2 == 1
        node = matrix


def copy_graph_module(gm: fx.GraphModule) -> fx.GraphModule:
    """Copy a GraphModule so that the copy's graph can be rewritten: same node names and metadata, shared attributes."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        copied = graph.node_copy(node, mapping.__getitem__)
        copied.meta = dict(node.meta)
        take_source(copied, node)
        mapping[node] = copied
    assert [node.name for node in graph.nodes] == [node.name for node in gm.graph.nodes], "a copy keeps node names"
    copied_module = fx.GraphModule(gm, graph, class_name=type(gm).__name__)
    copy_dynamo_attributes(gm, copied_module)
    return copied_module


def nodes_by_name(graph: fx.Graph) -> dict[str, fx.Node]:
    """Return the nodes of `graph` by name; names are how the facts of `ir.py` refer to nodes."""
    return {node.name: node for node in graph.nodes}


class Rewriter:
    """Inserts nodes into a graph, tagged with the pass and site they come from.

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

    @contextmanager
    def before(self, anchor: fx.Node, site: str = "") -> Iterator[None]:
        """Insert before `anchor`; new nodes take over its stack trace, module stack and checkpoint tags."""
        previous = self._anchor, self._site
        self._anchor, self._site = anchor, site or self._site
        try:
            with self.graph.inserting_before(anchor):
                yield
        finally:
            self._anchor, self._site = previous

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
        """Insert a read of a tensor constant of the graph; the tensor is registered under `name` on the first use."""
        from sparse_compile.torch_private import register_graph_buffer

        if not hasattr(self.gm, name):
            register_graph_buffer(self.gm, name, value)
        return self._tagged(self.graph.get_attr(name))

    def copy(self, node: fx.Node, arg_map: Callable[[fx.Node], fx.Node]) -> fx.Node:
        """Insert a copy of `node` with its node arguments replaced."""
        copied = self.graph.node_copy(node, arg_map)
        copied.meta = {key: value for key, value in node.meta.items() if key != "example_value"}
        self._tagged(copied)
        if (value := tensor_value(node)) is not None:
            copied.meta[TAG]["dtype"] = value.dtype  # what is copied for fewer rows keeps it
        return copied

    def _tagged(self, node: fx.Node) -> fx.Node:
        self.inserted += 1
        if self._anchor is not None:
            for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "recompute", "ac_graph_id"):
                if key in self._anchor.meta and key not in node.meta:
                    node.meta[key] = self._anchor.meta[key]
        node.meta[TAG] = {"pass": self.pass_name, "site": self._site}
        return node


def forward_to(old: fx.Node, existing: fx.Node) -> None:
    """Give the users of `old` the node `existing`, which holds the same value, and erase `old`."""
    old.replace_all_uses_with(existing)
    old.graph.erase_node(old)


def take_over(old: fx.Node, new: fx.Node) -> int:
    """Put the inserted node `new` in the place of `old`; erase what only `old` used; return how many nodes that were.

    `new` takes over the name as well: facts refer to nodes by name, and diffs between dumps stay small.
    """
    new.meta["example_value"] = value_of(old)
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


def save_what_precedes(end: fx.Node) -> None:
    """Mark every call before `end` to be saved for the backward, whatever checkpoint it took its marks from.

    What stands at the top of a graph is of the forward: read again in the backward, roles may have closed, and a
    data-dependent size would be another symbol.
    """
    for node in takewhile(lambda node: node is not end, end.graph.nodes):
        if node.op != "placeholder":
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
            node.meta.pop("ac_graph_id", None)


def set_argument(node: fx.Node, position: int, name: str, value: Argument) -> None:
    """Set an argument of a call, by position where it was given so, else by name."""
    if len(node.args) > position:
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)


def erase_unused(root: fx.Node) -> int:
    """Erase `root` and the calls that only it used.

    Only what is reached from `root` is erased: a call without users elsewhere may have an effect.
    """
    erased = 0
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
