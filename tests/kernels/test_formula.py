"""Formulas say what PyTorch computes: values and derivatives, at kinks and far out, from calls and from text."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import sympy
import torch
from torch import Tensor, fx
from torch.nn import functional as F  # noqa: N812

from sparse_compile.graph.declined import Declined
from sparse_compile.kernels.codegen.elementwise import lift
from sparse_compile.kernels.codegen.formula import FUNCTIONS, Formula, number, parsed, select, sigmoid

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu squared": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "leaky_relu slope": lambda x: F.leaky_relu(x, negative_slope=0.3),
    "elu": F.elu,
    "elu alpha": lambda x: F.elu(x, alpha=1.7),
    "celu": lambda x: F.celu(x, alpha=0.6),
    "selu": F.selu,
    "hardtanh": F.hardtanh,
    "hardtanh bounds": lambda x: F.hardtanh(x, min_val=-0.25, max_val=2.0),
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "erf": torch.erf,
    "mish": F.mish,
    "softplus": F.softplus,
    "softplus beta": lambda x: F.softplus(x, beta=2.0),
    "logsigmoid": F.logsigmoid,
    "softsign": F.softsign,
    "clamp": lambda x: x.clamp(-0.5, 1.0),
    "clamp by name": lambda x: torch.clamp(x, min=-0.5, max=1.0),
    "clamp below": lambda x: x.clamp(min=0.25),
    "clamp_max": lambda x: x.clamp_max(0.25),
    "abs": torch.abs,
    "square": torch.square,
    "cube": lambda x: x**3,
    "quick gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "reflected": lambda x: 1.0 - 2 / (3 + x * x),
    "rsub": lambda x: torch.rsub(x, 2.0),
    "alpha": lambda x: torch.add(x, x, alpha=3) - torch.sub(x, 0.5, alpha=2),
    "in place": lambda x: x.mul(2.0).add_(1.0).relu_(),
    "roots": lambda x: (x * x + 1).sqrt() + (x * x + 2).rsqrt() + (x * x + 3) ** -0.5 + (x * x + 1).reciprocal(),
    "exp and log": lambda x: torch.exp(-x * x) + torch.log(1 + x * x),
    "neg": lambda x: -x,
    "casts": lambda x: x.to(torch.float64).double().contiguous(),
    "dead dropout": lambda x: F.dropout(x, 0.3, False) + F.dropout(x, 0.0, True),
    "by keyword": lambda x: torch.mul(input=x, other=x),
}
# Around every kink of the table, on it, and far out.
POINTS = torch.tensor(
    [-60.0, -9.0, -3.0, -2.9, -1.0, -0.5, -0.3, -1e-3, 0.0, 1e-3, 0.25, 0.3, 1.0, 2.0, 2.9, 3.0, 6.0, 7.0, 60.0],
    dtype=torch.float64,
)


def formula_of(function: Callable[[Tensor], Tensor]) -> Formula:
    """Lift a function of one tensor by its FX trace."""
    x = sympy.Symbol("p0")
    values: dict[fx.Node, sympy.Expr] = {}
    # Wrapped: what is built into PyTorch cannot be traced by itself.
    graph = fx.symbolic_trace(lambda x: function(x)).graph

    def operand(value: object) -> object:
        if isinstance(value, fx.Node):
            return values[value]
        return number(value) if isinstance(value, int | float) else None

    for node in graph.nodes:
        if node.op == "output":
            return Formula.of(values[node.args[0]])
        values[node] = x if node.op == "placeholder" else lift(node, operand)
    raise AssertionError("a graph has an output")


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_value_and_derivative(name: str) -> None:
    function = ACTIVATIONS[name]
    formula = formula_of(function)
    x = POINTS.clone().requires_grad_()
    expected = function(x + 0)
    (slope,) = torch.autograd.grad(expected.sum(), x)
    values = {"p0": POINTS}
    # PyTorch takes softplus for x itself above 20, and holds some constants, such as a sixth, in fp32.
    torch.testing.assert_close(formula.evaluate(values), expected.detach(), rtol=1e-7, atol=3e-9)
    torch.testing.assert_close(formula.derivative("p0").evaluate(values), slope, rtol=1e-7, atol=5e-8)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_text_is_all_there_is(name: str) -> None:
    formula = formula_of(ACTIVATIONS[name])
    again = parsed(str(formula.text))
    assert torch.equal(again.evaluate({"p0": POINTS}), formula.evaluate({"p0": POINTS}))
    assert Formula.of(again.expression) == formula
    assert parsed(formula.text) is parsed(formula.text)


@pytest.mark.parametrize("name", ["silu", "gelu tanh", "softplus", "mish", "elu", "tanh"])
def test_finite_in_fp32_far_out(name: str) -> None:
    far = {"p0": torch.tensor([-1e4, -200.0, -88.0, 88.0, 200.0, 1e4])}
    formula = formula_of(ACTIVATIONS[name])
    assert formula.evaluate(far).isfinite().all()
    assert formula.derivative("p0").evaluate(far).isfinite().all()


def test_gradients_that_are_multiples_are_one() -> None:
    formula = parsed("(p0 + 2.0*t0 + v0)*sigmoid(p0 + 2.0*t0 + v0)*(p1 - 0.5*t1)")
    found = formula.gradients(("p0", "p1", "t0", "t1", "v0"))
    assert len(found.formulas) == 2
    assert found.places == ((0, 1.0), (1, 1.0), (0, 2.0), (1, -0.5), (0, 1.0))
    values = {name: torch.randn(5, dtype=torch.float64).requires_grad_() for name in formula.operands}
    expected = torch.autograd.grad(formula.evaluate(values).sum(), list(values.values()))
    for operand, wanted in zip(values, expected, strict=True):
        index, scale = found.places[("p0", "p1", "t0", "t1", "v0").index(operand)]
        torch.testing.assert_close(found.formulas[index].evaluate(values) * scale, wanted)


def test_different_gradients_stay_apart() -> None:
    assert len(parsed("p0*p0 + p1").gradients(("p0", "p1")).formulas) == 2
    # A derivative of zero is nothing times any other.
    assert parsed("p0 + 0*p1").gradients(("p0", "p1")).places == ((0, 1.0), (0, 0.0))
    # Equal at the point where multiples are looked for, and nowhere else.
    assert len(parsed("p0**2/2 + 0.37*p1").gradients(("p0", "p1")).formulas) == 2


def test_a_constant_has_the_shape_of_its_operands() -> None:
    assert parsed("2").evaluate({"p0": torch.zeros(3)}).tolist() == [2.0, 2.0, 2.0]


def test_kinks_choose_by_their_spelling() -> None:
    x = sympy.Symbol("x")
    assert sympy.diff(select(x, x, 0), x) == select(x, 1, 0)
    assert select(x, 3, 3) == 3 and select(sympy.Integer(0), 1, 2) == 2 and select(sympy.Integer(1), 1, 2) == 1
    assert sympy.diff(sigmoid(2 * x), x) == 2 * sigmoid(2 * x) * (1 - sigmoid(2 * x))


@pytest.mark.parametrize("text", ["p0 +", "import os", "sin(p0)", "gamma(p0)", "p0.real"])
def test_no_formula(text: str) -> None:
    with pytest.raises(ValueError, match="formula"):
        _ = Formula(text).expression


def test_a_missing_operand() -> None:
    with pytest.raises(ValueError, match="no value for p1"):
        parsed("p0*p1").evaluate({"p0": torch.ones(1)})


@pytest.mark.parametrize("value", [math.inf, math.nan, True])
def test_no_number(value: float) -> None:
    with pytest.raises(ValueError, match="no number that a formula can hold"):
        number(value)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (torch.cos, "cos has no formula"),
        (lambda x: x**0.3, "a power of 0.3"),
        (lambda x: x**40, "a power of 40"),
        (lambda x: 2.0**x, "a power whose exponent is computed"),
        (lambda x: F.softplus(x, threshold=3), "softplus with the threshold 3"),
        (lambda x: F.dropout(x, 0.5, True), "dropout draws"),
        (lambda x: torch.div(x, 3, rounding_mode="floor"), "div with these arguments has no formula"),
    ],
)
def test_what_is_not_lifted(function: Callable[[Tensor], Tensor], reason: str) -> None:
    with pytest.raises(Declined, match=reason):
        formula_of(function)


def test_every_function_is_evaluated() -> None:
    x = {"p0": torch.tensor([0.5], dtype=torch.float64)}
    for name in FUNCTIONS:
        text = "select(p0, p0, 0)" if name == "select" else f"{name}(p0)"
        assert parsed(text).evaluate(x).isfinite().all()
