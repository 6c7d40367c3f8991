"""Elementwise formulas: text that is parsed into sympy, differentiated, and evaluated on tensors.

Written in the four arithmetic operations, integer and half powers, and the functions of `FUNCTIONS`, over symbols such
as `p0`. Each function has a form that neither overflows nor cancels in fp32 wherever its value and its derivative are
finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import sympy
import torch
from sympy.printing.str import StrPrinter
from torch import Tensor


class sigmoid(sympy.Function):  # type: ignore[misc]  # noqa: N801  (the class's name is what formulas call it)
    """1 / (1 + exp(-x))."""

    nargs = 1

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        """Return s (1 - s)."""
        return self * (1 - self)


class softplus(sympy.Function):  # type: ignore[misc]  # noqa: N801
    """log(1 + exp(x))."""

    nargs = 1

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        """Return the sigmoid of x."""
        return sigmoid(self.args[0])


class select(sympy.Function):  # type: ignore[misc]  # noqa: N801
    """`select(c, a, b)` is a where c > 0, else b.

    Its derivative by c is zero, so that a formula with a kink chooses by its spelling which side's derivative it takes
    there. sympy's own `Max` and `Heaviside` have the value 1/2 at the kink, which PyTorch never takes.
    """

    nargs = 3

    @classmethod
    def eval(cls, condition: sympy.Expr, one: sympy.Expr, other: sympy.Expr) -> sympy.Expr | None:
        """Return what is left where nothing is to be chosen."""
        if one == other:
            return one
        return None if not condition.is_number else one if condition > 0 else other

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        """Return the derivative by one argument."""
        condition = self.args[0]
        return (sympy.S.Zero, select(condition, 1, 0), select(condition, 0, 1))[argindex - 1]


FUNCTIONS: dict[str, Any] = {
    "sigmoid": sigmoid,
    "softplus": softplus,
    "select": select,
    "tanh": sympy.tanh,
    "erf": sympy.erf,
    "exp": sympy.exp,
    "log": sympy.log,
    "sqrt": sympy.sqrt,
}

_ON_TENSORS: dict[str, Callable[..., Tensor]] = {
    "sigmoid": torch.sigmoid,
    "softplus": torch.nn.functional.softplus,
    "tanh": torch.tanh,
    "erf": torch.erf,
    "exp": torch.exp,
    "log": torch.log,
}


class _ExactPrinter(StrPrinter):  # type: ignore[misc]
    """Prints a number with all the digits of a double."""

    def _print_Float(self, expr: sympy.Float) -> str:  # noqa: N802
        return repr(float(expr))


@dataclass(frozen=True)
class Formula:
    """An elementwise function of named operands.

    Attributes:
        text: such as `"p0*p1*sigmoid(p0)"`.
    """

    text: str

    @classmethod
    def of(cls, expression: sympy.Expr) -> Formula:
        """Return the formula of an expression; equal expressions give equal texts."""
        return parsed(_ExactPrinter().doprint(expression))

    @cached_property
    def expression(self) -> sympy.Expr:
        """The formula in sympy.

        Raises:
            ValueError: the text is none, or calls a function that formulas do not have.
        """
        try:
            expression = sympy.sympify(self.text, locals=FUNCTIONS | _Symbols())
        except (sympy.SympifyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a formula: {self.text!r}: {error}") from error
        known = set(FUNCTIONS)
        if unknown := {call.func.__name__ for call in expression.atoms(sympy.Function)} - known:
            raise ValueError(f"a formula has no {', '.join(sorted(unknown))}; it has {', '.join(sorted(known))}")
        return expression

    @property
    def operands(self) -> tuple[str, ...]:
        """Names of the operands that it reads, sorted."""
        return tuple(sorted(symbol.name for symbol in self.expression.free_symbols))

    def derivative(self, operand: str) -> Formula:
        """Return the partial derivative by an operand."""
        return Formula.of(sympy.diff(self.expression, sympy.Symbol(operand)))

    def gradients(self, operands: tuple[str, ...]) -> Gradients:
        """Return the derivatives by some operands, those that are multiples of another one once.

        A bias, an adapter and the product that they are added to have one derivative, but for the adapter's scale.
        """
        distinct: list[sympy.Expr] = []
        places: list[tuple[int, float]] = []
        for operand in operands:
            found = self.derivative(operand).expression
            multiples = ((index, _multiple(found, other)) for index, other in enumerate(distinct))
            index, scale = next(((i, scale) for i, scale in multiples if scale is not None), (len(distinct), 1.0))
            if index == len(distinct):
                distinct.append(found)
            places.append((index, scale))
        return Gradients(tuple(Formula.of(each) for each in distinct), tuple(places))

    def evaluate(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return its value on tensors that broadcast together, computed in their dtype.

        Raises:
            ValueError: an operand has no value.
        """
        if missing := set(self.operands) - set(values):
            raise ValueError(f"no value for {', '.join(sorted(missing))}")
        result = _evaluate(self.expression, values)
        like = next(iter(values.values()))
        return result if isinstance(result, Tensor) else torch.full_like(like, result)


@dataclass(frozen=True)
class Gradients:
    """Derivatives of a formula.

    Attributes:
        formulas: the distinct ones.
        places: by operand, the index of its derivative among them and the number to multiply it by.
    """

    formulas: tuple[Formula, ...]
    places: tuple[tuple[int, float], ...]


def _multiple(one: sympy.Expr, other: sympy.Expr) -> float | None:
    """Return the number that `other` must be multiplied by to give `one`, or None where none is found."""
    if other == 0:
        return None
    point = {symbol: sympy.Float(0.37 + 0.11 * i) for i, symbol in enumerate(sorted(other.free_symbols, key=str))}
    at = other.subs(point)
    if at == 0 or one.free_symbols != other.free_symbols:
        return None
    scale = number(round(float((one.subs(point) / at).evalf()), 12))
    return float(scale) if sympy.expand(one - scale * other) == 0 else None


class _Symbols(dict[str, Any]):
    """Names that stand for operands, though sympy has constants of these names."""

    def __init__(self) -> None:
        super().__init__()
        for kind in ("p", "t", "v"):
            for index in range(32):
                self[f"{kind}{index}"] = sympy.Symbol(f"{kind}{index}")


@lru_cache(maxsize=4096)
def parsed(text: str) -> Formula:
    """Return the formula of a text; the same object for the same text, so that it is parsed once."""
    return Formula(text)


def number(value: float) -> sympy.Expr:
    """Return a number of a graph as sympy has it: an integer where it is one, so that powers and signs stay simple."""
    if isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number that a formula can hold")
    return sympy.Integer(int(value)) if float(value).is_integer() else sympy.Float(value, 17)


def _evaluate(expression: sympy.Expr, values: Mapping[str, Tensor]) -> Any:
    """Return an expression's value: a number, or a tensor."""
    if expression.is_Symbol:
        return values[expression.name]
    if expression.is_number:
        return float(expression)
    operands = [_evaluate(argument, values) for argument in expression.args]
    if expression.is_Add:
        return sum(operands[1:], operands[0])
    if expression.is_Mul:
        return math.prod(operands[1:], start=operands[0])
    if expression.is_Pow:
        return operands[0] ** operands[1]
    if isinstance(expression, select):
        like = next(operand for operand in operands if isinstance(operand, Tensor))
        one, other = (torch.as_tensor(operand, dtype=like.dtype, device=like.device) for operand in operands[1:])
        return torch.where(operands[0] > 0, one, other)
    return _ON_TENSORS[type(expression).__name__](*operands)
