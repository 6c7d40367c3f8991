"""Write graphs as text that can be read and compared.

One node a line: name, dtype and shape, call, operands. Parameters are named by their path in the user's model. The text
depends on the graph alone, so that two runs give the same text and `diff -u` between two passes shows what one did:
sizes that depend on data are numbered in the order in which they appear.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from sparse_compile.graph.read import value_of
from sparse_compile.graph.sites import Parameter
from sparse_compile.graph.vocabulary import TAG
from sparse_compile.torch_private.aten import overload

_DTYPES = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "bool",
}  # fmt: skip


def render_graph(graph: fx.Graph, parameters: Mapping[str, Parameter]) -> str:
    """Return the text of a graph.

    Args:
        graph: the graph.
        parameters: its parameters by placeholder name.
    """
    names = {node.name: parameters[node.name].path for node in graph.nodes if node.name in parameters}
    sizes: dict[str, str] = {}
    return "\n".join(_line(node, names, sizes) for node in graph.nodes) + "\n"


def _line(node: fx.Node, names: Mapping[str, str], sizes: dict[str, str]) -> str:
    name = f"%{names.get(node.name, node.name)}"
    if node.op == "output":
        return f"return {_operand(node.args[0], names)}"
    if node.op == "placeholder":
        return f"{name} : {_type(value_of(node), sizes)} = input"
    annotation = f" : {_type(value_of(node), sizes)}" if value_of(node) is not None else ""
    if node.op == "get_attr":
        return f"{name}{annotation} = constant {node.target}"
    operands = [_operand(arg, names) for arg in node.args]
    operands += [f"{key}={_operand(value, names)}" for key, value in node.kwargs.items()]
    tag = node.meta.get(TAG)
    origin = f"    # {tag['pass']}" + (f" {tag['site']}" if tag["site"] else "") if tag else ""
    return f"{name}{annotation} = {_target(node)}({', '.join(operands)}){origin}"


def _target(node: fx.Node) -> str:
    target: Any = node.target
    if isinstance(target, str):
        return f".{target}"
    if overload(target) is not None:
        return str(target)
    module = getattr(target, "__module__", None) or "torch"
    return f"{module.replace('_operator', 'operator')}.{getattr(target, '__name__', type(target).__name__)}"


def _operand(value: Any, names: Mapping[str, str]) -> str:
    if isinstance(value, fx.Node):
        return f"%{names.get(value.name, value.name)}"
    if isinstance(value, tuple | list):
        return f"({', '.join(_operand(item, names) for item in value)})"
    if isinstance(value, slice):
        return ":".join("" if part is None else _operand(part, names) for part in (value.start, value.stop, value.step))
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_operand(item, names)}' for key, item in value.items())}}}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _type(value: Any, sizes: dict[str, str]) -> str:
    """Return a type as text; `sizes` maps what PyTorch calls data-dependent sizes to `u0`, `u1`, ..., and grows."""
    if isinstance(value, Tensor):
        shape = ", ".join(str(size) for size in value.shape)
        shape = re.sub(r"\bu\d+\b", lambda found: sizes.setdefault(found[0], f"u{len(sizes)}"), shape)
        return f"{_DTYPES.get(value.dtype, str(value.dtype))}[{shape}]"
    if isinstance(value, tuple | list):
        return f"({', '.join(_type(item, sizes) for item in value)})"
    return type(value).__name__
