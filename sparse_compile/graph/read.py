"""Read the FX graphs that Dynamo hands over: values, calls and their arguments, what a node is computed from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.node import Argument

from sparse_compile.graph.vocabulary import CASTS, PARAMETERS, TRANSPOSES
from sparse_compile.torch_private.aten import op_namespace, overload, overload_name, overload_parameters
from sparse_compile.torch_private.fake import size_hint


def value_of(node: fx.Node) -> Any:
    """Return the example value Dynamo recorded for `node` (a FakeTensor for a tensor), or None."""
    return node.meta.get("example_value")


def tensor_value(node: Any) -> Tensor | None:
    """Return the example tensor of `node`, or None where it is not a node that holds a tensor."""
    value = value_of(node) if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def tensor_of(node: fx.Node) -> Tensor:
    """Return the example tensor of a node that is known to hold one."""
    value = tensor_value(node)
    assert value is not None, f"{node} holds no tensor"
    return value


def shape_of(node: fx.Node) -> tuple[int | torch.SymInt, ...]:
    """Return the shape of a tensor node, symbolic sizes as they are; empty for anything else."""
    value = tensor_value(node)
    return () if value is None else tuple(value.shape)


def hinted_shape(node: fx.Node) -> tuple[int, ...]:
    """Return the shape of the tensor `node`, symbolic sizes replaced by their hints, without adding a guard."""
    return tuple(size_hint(size) for size in tensor_of(node).shape)


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


_OP_NAMESPACES = ("aten", "sparselora")
"""Libraries of ops whose names are known here: another library may call anything `add`."""


def calls_torch(node: fx.Node) -> bool:
    """Tell whether `node` is a method of a tensor or a function of PyTorch, whose name then says what it does."""
    if node.op == "call_method":
        return tensor_value(node.args[0]) is not None if node.args else False
    if node.op != "call_function":
        return False
    if (namespace := op_namespace(node.target)) is not None:
        return namespace in _OP_NAMESPACES
    module = getattr(node.target, "__module__", None) or ""
    # Builtins of torch (torch.matmul, torch._C._nn.gelu) report no module or a private one.
    return module.split(".")[0] in _TENSOR_NAMESPACES or torch.overrides.is_tensor_method_or_property(
        cast("Callable[..., Any]", node.target)
    )


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """Return an argument of a call by the name of its parameter, whether it was given by position or by name.

    Args:
        node: the call.
        name: the parameter, as the schema of an operator or `vocabulary.PARAMETERS` names it. `input` is the first
            parameter of every other call.
        default: what to return where the call leaves it out.
    """
    for position, spellings in enumerate(_parameters(node)):
        if name in spellings:
            if position < len(node.args):
                return node.args[position]
            given = [node.kwargs[spelling] for spelling in spellings if spelling in node.kwargs]
            return given[0] if given else default
    return node.kwargs.get(name, default)


def factors(node: fx.Node) -> tuple[Any, Any]:
    """Return the two operands of a call of `vocabulary.PRODUCTS`, left and right, whose matrix product it computes."""
    left, right = ("batch1", "batch2") if op_name(node) == "baddbmm" else ("input", "other")
    return argument(node, left), argument(node, right)


def set_argument(node: fx.Node, name: str, value: Argument) -> None:
    """Set an argument of a call, by position where it was given so, else by name."""
    for position, spellings in enumerate(_parameters(node)):
        if name in spellings:
            if position < len(node.args):
                node.update_arg(position, value)
                return
            name = next((spelling for spelling in spellings if spelling in node.kwargs), name)
    node.update_kwarg(name, value)


def _parameters(node: fx.Node) -> tuple[tuple[str, ...], ...]:
    """Return the spellings of each parameter of a call, in order."""
    if (op := overload(node.target)) is not None and op.namespace != "aten":
        return tuple((name,) for name in overload_parameters(op))
    return PARAMETERS.get(op_name(node), (("input",),))


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
        source = argument(node, "input")
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
        order: Any = argument(node, "dims")
        if isinstance(order, int):
            order = node.args[1:]
        return int([dim % 2 for dim in order] == [1, 0])
    if op_name(node) in ("transpose", "swapaxes", "swapdims"):
        first, second = (argument(node, name) for name in ("dim0", "dim1"))
        return int(first % 2 != second % 2)
    return 1


def stored_matrix(node: fx.Node) -> tuple[fx.Node, bool]:
    """Follow casts, detaches and transposes of a matrix back to what is stored; tell whether that is the transpose."""
    count = 0
    while True:
        matrix, transposes = strip_transposes(strip_casts(node))
        count += transposes
        if op_name(matrix) == "detach":
            matrix = argument(matrix, "input")
        if matrix is node:
            return node, count % 2 == 1
        node = matrix


def nodes_by_name(graph: fx.Graph) -> dict[str, fx.Node]:
    """Return the nodes of `graph` by name; names are how the facts of `graph/facts.py` refer to nodes."""
    return {node.name: node for node in graph.nodes}
