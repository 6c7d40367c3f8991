"""Stand-ins: tensors with a shape and no data, and sizes that are symbols."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import sympy
import torch
from torch import Tensor, fx


def new_unbacked_size(max_size: int | torch.SymInt) -> torch.SymInt:
    """Return a fresh data-dependent size in [0, max_size], to be called in the fake of a custom op.

    The public `torch.library.get_ctx().new_dynamic_size()` refuses while `capture_dynamic_output_shape_ops` is off.
    That setting guards a user's program against surprises; our sizes are bounded and never branched on.
    """
    from torch._library.fake_impl import allocate_size

    shape_env = torch.library.get_ctx()._shape_env
    assert shape_env is not None, "a data-dependent size needs a ShapeEnv"
    size: torch.SymInt = allocate_size(shape_env)  # type: ignore[no-untyped-call]
    torch._check(size <= max_size)  # type: ignore[no-untyped-call]
    return size


UNKNOWN_SIZE = 8191
"""Stands for a size that depends on data, of which nothing is seen at tracing: a prime, which no view divides."""


def size_hint(size: int | torch.SymInt) -> int:
    """Return the size seen at tracing, without adding a guard."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return UNKNOWN_SIZE if hint is None else int(hint)


def size_expression(size: int | torch.SymInt) -> sympy.Expr:
    """Return a size as an expression over the graph's symbols: equal expressions are equal sizes for every batch."""
    return sympy.Integer(size) if isinstance(size, int) else size.node.expr


def evaluate_on_stand_ins(like: Tensor, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function on the stand-ins of a captured graph; data-dependent sizes that it makes are bound to nothing.

    Args:
        like: a stand-in of the graph, whose mode is entered.
        function: what to call.
        *arguments: its arguments, stand-ins among them.
    """
    from torch._subclasses.fake_tensor import FakeTensor

    if not isinstance(like, FakeTensor):
        return function(*arguments)
    mode = like.fake_mode
    ignore = mode.shape_env.ignore_fresh_unbacked_symbols() if mode.shape_env is not None else nullcontext()
    with mode, ignore:
        return function(*arguments)


def is_fake(value: object) -> bool:
    """Tell whether `value` is a FakeTensor: a tensor with a shape but no data."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(value, FakeTensor)


def fake_outputs(gm: fx.GraphModule) -> dict[str, Tensor] | None:
    """Run a captured graph on the stand-ins it was captured with; return the value of every output node by name.

    Returns None for a graph without stand-ins. Symbols made on the way are dropped: AOTAutograd traces the graph
    again and makes its own.
    """
    from torch._subclasses.fake_tensor import FakeTensor

    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    values = [node.meta.get("example_value") for node in placeholders]
    # Dynamo captured with a mode of its own; the one in force now is AOTAutograd's, with the same ShapeEnv.
    modes = [value.fake_mode for value in values if isinstance(value, FakeTensor)]
    if not modes:
        return None
    mode = modes[0]
    output = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
    wanted = set(output.all_input_nodes)
    found: dict[str, Tensor] = {}

    class _Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n in wanted:
                found[n.name] = result
            return result

        def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
            value = super().get_attr(target, args, kwargs)
            return mode.from_tensor(value) if isinstance(value, Tensor) and not is_fake(value) else value

    ignore = mode.shape_env.ignore_fresh_unbacked_symbols() if mode.shape_env is not None else nullcontext()
    with mode, ignore:
        _Recorder(gm).run(*values)
    return found
