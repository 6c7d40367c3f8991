"""The meaning of PyTorch's elementwise calls as sympy expressions.

Kinks follow PyTorch's derivatives: `relu` has 0 at 0, `clamp` has 1 on its bounds, the `hard` functions have 0 there.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from sparse_compile.graph.declined import Declined
from sparse_compile.graph.read import argument, op_name
from sparse_compile.graph.vocabulary import CASTS
from sparse_compile.kernels.codegen.formula import number, select, sigmoid, softplus


def _clamp(x: sympy.Expr, low: Any = None, high: Any = None) -> sympy.Expr:
    if high is not None:
        x = select(x - high, high, x)
    return x if low is None else select(low - x, low, x)


def _hard(x: sympy.Expr, low: Any = -1, high: Any = 1) -> sympy.Expr:
    return select(x - low, select(high - x, x, high), low)


def _gelu(x: sympy.Expr, approximate: str = "none") -> sympy.Expr:
    if approximate == "tanh":
        inner = sympy.Float(0.7978845608028654, 17) * (x + sympy.Float(0.044715, 17) * x**3)
        # (1 + tanh(u)) / 2 cancels for u below -8, where its value is the sigmoid's, 2 u.
        return x * sigmoid(2 * inner)
    return x * (1 + sympy.erf(x * sympy.Float(0.7071067811865476, 17))) / 2


def _softplus(x: sympy.Expr, beta: Any = 1, threshold: Any = 20) -> sympy.Expr:
    # Above the threshold PyTorch takes beta x itself, which differs by less than exp(-threshold).
    if threshold < 20:
        raise Declined("softplus", f"softplus with the threshold {threshold} is another function")
    return softplus(beta * x) / beta


def _elu(x: sympy.Expr, alpha: Any = 1, scale: Any = 1, input_scale: Any = 1) -> sympy.Expr:
    # exp of a positive number that is not chosen may overflow, and inf * 0 in the derivative is NaN.
    below = select(x, 0, x)
    return scale * select(x, x, alpha * (sympy.exp(input_scale * below) - 1))


def _absolute(x: sympy.Expr) -> sympy.Expr:
    return select(x, x, select(-x, -x, 0))


def _power(x: sympy.Expr, exponent: Any) -> sympy.Expr:
    if not exponent.is_number:
        raise Declined("pow", "a power whose exponent is computed has no formula")
    if abs(exponent) > 8 or (2 * exponent) % 1:
        raise Declined("pow", f"a power of {float(exponent):g} is no product of few factors")
    return x ** sympy.Rational(int(2 * exponent), 2)


_LEAKY_SLOPE = number(0.01)
_SELU_SCALE, _SELU_ALPHA = number(1.0507009873554805), number(1.6732632423543772)

_CALLS: dict[str, Callable[..., sympy.Expr]] = {
    "add": lambda x, y, alpha=1: x + alpha * y,
    "sub": lambda x, y, alpha=1: x - alpha * y,
    "rsub": lambda x, y, alpha=1: y - alpha * x,
    "mul": operator.mul,
    "div": lambda x, y: x / y,
    "neg": operator.neg,
    "pow": _power,
    "square": lambda x: x**2,
    "sqrt": sympy.sqrt,
    "rsqrt": lambda x: 1 / sympy.sqrt(x),
    "reciprocal": lambda x: 1 / x,
    "exp": sympy.exp,
    "log": sympy.log,
    "tanh": sympy.tanh,
    "erf": sympy.erf,
    "sigmoid": sigmoid,
    "logsigmoid": lambda x: -softplus(-x),
    "softplus": _softplus,
    "softsign": lambda x: x / (1 + _absolute(x)),
    "silu": lambda x: x * sigmoid(x),
    "mish": lambda x: x * sympy.tanh(softplus(x)),
    "gelu": _gelu,
    "relu": lambda x: select(x, x, 0),
    "relu6": lambda x: _hard(x, 0, 6),
    "leaky_relu": lambda x, slope=_LEAKY_SLOPE: select(x, x, slope * x),
    "elu": _elu,
    "celu": lambda x, alpha=1: _elu(x, alpha, 1, 1 / sympy.sympify(alpha)),
    "selu": lambda x: _elu(x, _SELU_ALPHA, _SELU_SCALE),
    "hardtanh": _hard,
    "hardsigmoid": lambda x: _hard(x + 3, 0, 6) / 6,
    "hardswish": lambda x: x * _hard(x + 3, 0, 6) / 6,
    "clamp": _clamp,
    "clamp_min": lambda x, low: _clamp(x, low),
    "clamp_max": lambda x, high: _clamp(x, None, high),
    "abs": _absolute,
}
_SPELLINGS = {
    "subtract": "sub", "multiply": "mul", "divide": "div", "truediv": "div", "negative": "neg", "clip": "clamp",
    "absolute": "abs", "log_sigmoid": "logsigmoid",
}  # fmt: skip
_KEYWORDS = {"min": "low", "max": "high", "min_val": "low", "max_val": "high", "negative_slope": "slope"}
_IGNORED = {"inplace", "input", "other", "self", "exponent"}
_SAME_VALUE = CASTS | {"contiguous", "clone"}


def lift(node: fx.Node, operand: Callable[[Any], Any]) -> sympy.Expr:
    """Return the expression of an elementwise call.

    Args:
        node: the call.
        operand: maps an argument of the call, a node or a number, to its expression.

    Raises:
        Declined: the call has no formula, or an argument that it cannot hold.
    """
    name = _canonical(op_name(node))
    if name in _SAME_VALUE:
        return operand(argument(node, "input"))
    if name == "dropout":
        if argument(node, "training") is False or argument(node, "p") == 0:
            return operand(argument(node, "input"))
        raise Declined(node, "dropout draws a number for each element")
    if name not in _CALLS:
        raise Declined(node, f"{op_name(node) or node.name} has no formula")
    values = [operand(value) for value in node.args if not isinstance(value, bool)]
    # What may be given by name and is an operand: `torch.mul(input=x, other=y)`.
    values += [operand(node.kwargs[key]) for key in ("input", "self", "other", "exponent") if key in node.kwargs]
    options = {
        _KEYWORDS.get(key, key): value if isinstance(value, str) else operand(value)
        for key, value in node.kwargs.items()
        if key not in _IGNORED and value is not None
    }
    if op_name(node).startswith("__r") and name != "rsub":
        values.reverse()  # a reflected operator; `rsub` says so by its name
    try:
        return _CALLS[name](*values, **options)
    except TypeError as error:
        raise Declined(node, f"{op_name(node)} with these arguments has no formula") from error


def constant(value: Any) -> sympy.Expr | None:
    """Return what an argument that is no node stands for in a formula: a number, or nothing of a dtype or None.

    Raises:
        Declined: a formula cannot hold it.
    """
    if isinstance(value, int | float):
        try:
            return number(value)
        except ValueError as error:
            raise Declined(str(value), str(error)) from error
    if value is None or isinstance(value, torch.dtype):
        return None
    raise Declined(str(value), f"{value!r} is no operand of a formula")


def _canonical(name: str) -> str:
    """Return the one name of a function of several: `mul_`, `__rmul__`, `imul` and `multiply` are `mul`."""
    for written in (name, name.rstrip("_"), name.strip("_"), name.strip("_")[1:]):
        spelling = _SPELLINGS.get(written, written)
        if spelling in _CALLS or spelling in _SAME_VALUE or spelling == "dropout":
            return spelling
    return name
