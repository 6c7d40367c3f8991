"""A masked layer against a plain PyTorch one: values, both rules for gradients, blocks, dtypes, what is saved."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

import sparse_compile.kernels  # noqa: F401 - registers torch.ops.sparselora
from models import normal, random_mask
from sparse_compile.kernels.masked_linear import blocks, masked_weight
from sparse_compile.kernels.providers import REFERENCE
from sparse_compile.options.config import MASK_GRADIENTS
from tolerances import assert_close_rms

masked_linear = torch.ops.sparselora.masked_linear
PROVIDERS = (REFERENCE, "blocks")
SCALE = 1.75


def operands(tokens: int = 11, inputs: int = 150, outputs: int = 140, rank: int = 3) -> list[Tensor]:
    """Return x, a weight with 40% zeros, A, B and a bias, in fp64."""
    x, a, b, bias = normal(tokens, inputs), normal(rank, inputs, seed=2), normal(outputs, rank, seed=3), normal(outputs)
    weight = normal(outputs, inputs, seed=1) * random_mask(outputs, inputs, seed=4)
    return [each.requires_grad_(each is not weight) for each in (x, weight, a, b, bias)]


def plain(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """Mask as one writes it by hand, differentiated by autograd."""
    return linear(x, (weight + SCALE * b @ a) * (weight != 0), bias)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks and a ragged last one, of rows and of columns."""
    monkeypatch.setitem(blocks._BLOCK, "cpu", 1)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("provider", PROVIDERS)
def test_exact_is_autograd_of_the_masked_function(provider: str) -> None:
    given = operands()
    wanted = [given[0], *given[2:]]
    actual, expected = masked_linear(*given, SCALE, "exact", provider), plain(*given)
    assert_close_rms(actual, expected)
    seed = normal(*expected.shape, seed=9)
    gradients = torch.autograd.grad(actual, wanted, seed)
    names = ("x", "A", "B", "bias")
    for found, gradient, name in zip(gradients, torch.autograd.grad(expected, wanted, seed), names, strict=True):
        assert_close_rms(found, gradient, name=name)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("provider", PROVIDERS)
def test_straight_through_is_the_formula_of_the_paper(provider: str) -> None:
    """With the factor s, and with the gradient of x that of the masked function."""
    given = operands()
    x, weight, a, b, _ = given
    d_y = normal(11, 140, seed=9)
    found = torch.autograd.grad(masked_linear(*given, SCALE, "straight-through", provider), [x, a, b], d_y)
    gradient = d_y.t() @ x  # of the merged matrix: no mask
    expected = (d_y @ ((weight + SCALE * b @ a) * (weight != 0)), SCALE * b.t() @ gradient, SCALE * gradient @ a.t())
    for actual, wanted, name in zip(found, expected, "xAB", strict=True):
        assert_close_rms(actual, wanted, name=name)


def test_the_two_rules_agree_where_nothing_is_zero() -> None:
    x, weight, a, b, bias = operands()
    weight = weight.masked_fill(weight == 0, 0.5)
    found = [
        torch.autograd.grad(masked_linear(x, weight, a, b, bias, SCALE, rule, "blocks").sin().sum(), [x, a, b])
        for rule in MASK_GRADIENTS
    ]
    for first, second in zip(*found, strict=True):
        assert_close_rms(first, second)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_gradcheck_of_the_exact_rule(provider: str) -> None:
    x, weight, a, b, bias = operands(3, 5, 4, 2)
    torch.autograd.gradcheck(
        lambda x, a, b, bias: masked_linear(x, weight, a, b, bias, SCALE, "exact", provider), (x, a, b, bias)
    )


def test_zeros_stay_zeros_whatever_the_adapter_holds() -> None:
    _, weight, a, b, _ = operands()
    b.data[0] = float("inf")
    merged = masked_weight(weight, a, b, SCALE)
    assert torch.equal(merged == 0, weight == 0)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_fp32(bias: bool) -> None:
    """Wide enough for oneDNN, which takes fp32 products on some processors."""
    wide = operands()
    given = [each.detach().float().requires_grad_(each.requires_grad) for each in wide]
    if not bias:
        wide[4] = given[4] = None  # type: ignore[call-overload]
    y, expected = masked_linear(*given, SCALE, "exact", "blocks"), plain(*wide)
    assert_close_rms(y, expected)
    found = torch.autograd.grad(y.sin().sum(), [given[0], given[2], given[3]])
    wanted = torch.autograd.grad(expected.sin().sum(), [wide[0], wide[2], wide[3]])
    for gradient, want, name in zip(found, wanted, "xAB", strict=True):
        assert_close_rms(gradient, want, torch.float32, name=name)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("rule", MASK_GRADIENTS)
@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16], ids=["fp32 adapters", "bf16 adapters"])
def test_low_precision_rounds_the_merged_weight_once(rule: str, adapters: torch.dtype) -> None:
    """x and W in bf16: the product is that with `W~` merged in fp32 and rounded, as a checkpoint would hold it."""
    given = operands()
    low = [each.detach().bfloat16() for each in given]
    low[2], low[3] = low[2].to(adapters), low[3].to(adapters)
    merged = masked_weight(low[1], low[2], low[3], SCALE)
    assert merged.dtype == torch.bfloat16
    x, a, b = (low[i].requires_grad_() for i in (0, 2, 3))
    y = masked_linear(*low, SCALE, rule, "blocks")
    assert y.dtype == torch.bfloat16
    assert_close_rms(y, x.double() @ merged.double().t() + low[4].double(), torch.bfloat16)
    wide = [each.detach().double().requires_grad_(each.requires_grad) for each in low]
    expected = masked_linear(*wide, SCALE, rule)
    for found, want, given_to in zip(
        torch.autograd.grad(y.sum(), [x, a, b]),
        torch.autograd.grad(expected.sum(), [wide[0], wide[2], wide[3]]),
        (x, a, b),
        strict=False,
    ):
        assert found.dtype == given_to.dtype
        assert_close_rms(found, want, torch.bfloat16)


@pytest.mark.parametrize("rule", MASK_GRADIENTS)
def test_nothing_but_the_operands_is_saved(rule: str) -> None:
    given = operands()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (saved.append(tensor), tensor)[1], lambda x: x):
        y = masked_linear(*given, SCALE, rule, "blocks")
    assert {each.data_ptr() for each in saved} == {each.data_ptr() for each in given[:4]}
    y.sum().backward()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("rule", MASK_GRADIENTS)
def test_no_tensor_as_large_as_the_weight_is_formed(rule: str) -> None:
    """Neither the masked weight nor its gradient, in either direction."""
    from torch.utils._python_dispatch import TorchDispatchMode

    x, weight, a, b, bias = operands()
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
                largest = max(largest, out.numel())
            return out

    with Sizes():
        masked_linear(x, weight, a, b, bias, SCALE, rule, "blocks").sum().backward()
    assert 0 < largest < weight.numel() / 2


def test_second_derivatives_are_refused() -> None:
    x, weight, a, b, bias = operands(3, 5, 4, 2)
    (d_x,) = torch.autograd.grad(masked_linear(x, weight, a, b, bias, SCALE, "exact").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="masked_input_gradient"):
        torch.autograd.grad(d_x.sum(), a)


def test_a_trained_weight_and_an_unknown_rule_are_bugs() -> None:
    x, weight, a, b, bias = operands(3, 5, 4, 2)
    with pytest.raises(AssertionError, match="must be frozen"):
        masked_linear(x, weight.requires_grad_(), a, b, bias, SCALE, "exact")
    with pytest.raises(AssertionError, match="other"):
        masked_linear(x, weight.detach(), a, b, bias, SCALE, "other").sum().backward()
