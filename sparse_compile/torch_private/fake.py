"""Stand-ins: tensors with a shape and no data, and sizes that are symbols."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.node import map_arg
from torch.utils._sympy.symbol import SymT, symbol_is_type


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


def up_to_date(expression: sympy.Expr, size: torch.SymInt) -> sympy.Expr:
    """Return an expression with the symbols that the graph of `size` has for it by now.

    While a graph is compiled, sizes are found to be equal, and one symbol then stands for both.
    """
    return size.node.shape_env.replace(expression)


def is_fake(value: object) -> bool:
    """Tell whether `value` is a FakeTensor: a tensor with a shape but no data."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(value, FakeTensor)


def with_hints(size: torch.SymInt) -> sympy.Expr:
    """Return a size as an expression over the symbols that depend on data; the others are as seen at tracing."""
    shape_env = size.node.shape_env
    # PyTorch 2.12 renamed the table, and warns of the old name.
    table = "backed_var_to_val" if hasattr(shape_env, "backed_var_to_val") else "var_to_val"
    expression: sympy.Expr = size.node.expr.xreplace(getattr(shape_env, table))
    return expression


def is_unbacked(size: sympy.Expr) -> bool:
    """Tell whether a size is a symbol of its own that depends on data."""
    return isinstance(size, sympy.Symbol) and symbol_is_type(size, SymT.UNBACKED_INT)


class StandIns:
    """Computes what the nodes of a graph hold, on the stand-ins that the graph was captured with.

    Data-dependent sizes that are made on the way are bound to nothing: AOTAutograd traces the graph again and makes its
    own, and adds the guards that it needs.

    Args:
        gm: a graph as Dynamo hands it over, rewritten or not.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm = gm
        values = (node.meta.get("example_value") for node in gm.graph.nodes if node.op == "placeholder")
        # Dynamo captured with a mode of its own; the one in force now is AOTAutograd's, with the same ShapeEnv.
        self.mode = next((value.fake_mode for value in values if is_fake(value)), None)

    def evaluate(self, node: fx.Node, switches: Sequence[fx.Node] = ()) -> Any:
        """Return what a node holds, computed from the recorded values of its operands.

        Args:
            node: the node.
            switches: the calls before it that changed how calls are executed, in order: autocast, gradients.

        Raises:
            ValueError: an operand has no recorded value.
        """
        if node.op == "get_attr":
            return self._stand_in(_attribute(self._gm, str(node.target)))
        args, kwargs = map_arg((node.args, node.kwargs), _recorded)
        with self._entered(), _switched(switches):
            if node.op == "call_method":
                receiver, *rest = args
                return getattr(receiver, str(node.target))(*rest, **kwargs)
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def _stand_in(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or is_fake(value) or self.mode is None:
            return value
        return self.mode.from_tensor(value, static_shapes=True)

    @contextmanager
    def _entered(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self.mode is not None:
                stack.enter_context(self.mode)
                if self.mode.shape_env is not None:
                    stack.enter_context(self.mode.shape_env.ignore_fresh_unbacked_symbols())
                # Kernels written in C++ compare symbolic sizes with numbers; those in Python keep them symbols.
                stack.enter_context(enable_python_dispatcher())
            # Stand-ins are nothing for hooks that a user has around the step, to offload activations say.
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is))
            yield


def _as_it_is(value: Tensor) -> Tensor:
    return value


def _recorded(node: fx.Node) -> Any:
    if "example_value" not in node.meta:
        raise ValueError(f"what {node.name} holds was not recorded")
    return node.meta["example_value"]


def _attribute(gm: fx.GraphModule, path: str) -> Any:
    return functools.reduce(getattr, path.split("."), gm)


@contextmanager
def _switched(switches: Sequence[fx.Node]) -> Iterator[None]:
    """Have the calls of a graph that change a mode in force."""
    with ExitStack() as stack:
        for node in switches:
            name, (first, *rest) = getattr(node.target, "__name__", ""), node.args
            if name == "_enter_autocast":
                stack.enter_context(torch.autocast(first, *rest))  # type: ignore[arg-type]
            elif name == "_enter_inference_mode":
                stack.enter_context(torch.inference_mode(bool(first)))
            else:
                stack.enter_context(torch.set_grad_enabled(bool(first)))
        yield
