"""Streamed moments against those of all tokens at once, computed directly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from models import normal
from sparse_compile.surrogates.moments import Moments, NonFiniteActivation
from tolerances import assert_close_rms

IN, OUT = 6, 4


def rows(count: int, dtype: torch.dtype = torch.float64, mean: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw pairs of rows whose columns are correlated."""
    x = normal(count, IN, seed=seed) @ normal(IN, IN, seed=100) + mean
    y = x.tanh() @ normal(IN, OUT, seed=101) + normal(count, OUT, seed=seed + 1) - mean
    return x.to(dtype), y.to(dtype)


def direct(x: Tensor, y: Tensor) -> dict[str, Any]:
    """Compute the moments as their definition says, in fp64."""
    x, y = x.double(), y.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    return {"mean_x": mean_x, "mean_y": mean_y, "xx": x.mT @ x, "xy": x.mT @ y, "yy": y.square().sum()}


def assert_moments(actual: Moments, x: Tensor, y: Tensor, dtype: torch.dtype = torch.float64) -> None:
    assert actual.count == len(x)
    for name, expected in direct(x, y).items():
        assert_close_rms(torch.as_tensor(getattr(actual, name), dtype=torch.float64), expected, dtype, name=name)


def streamed(x: Tensor, y: Tensor, sizes: list[int]) -> Moments:
    moments = Moments.empty(IN, OUT, x)
    for each in zip(x.split(sizes), y.split(sizes), strict=True):
        moments.add(*each)
    return moments


def state(moments: Moments) -> list[Any]:
    return [
        each.clone() if isinstance(each, Tensor) else each
        for each in (moments.count, moments.mean_x, moments.mean_y, moments.xx, moments.xy, moments.yy)
    ]


def assert_same_state(actual: list[Any], expected: list[Any]) -> None:
    assert all(
        bool(torch.equal(a, e)) if isinstance(a, Tensor) else a == e for a, e in zip(actual, expected, strict=True)
    )


@pytest.mark.parametrize(
    "sizes", [[90], [45, 45], [1] * 90, [0, 89, 0, 0, 1], [1, 0, 88, 1], [7, 80, 3]], ids=lambda each: str(each[:4])
)
def test_any_split_gives_the_moments_of_all_tokens(sizes: list[int]) -> None:
    x, y = rows(90, mean=3)
    assert_moments(streamed(x, y, sizes), x, y)


def test_one_token_has_no_spread() -> None:
    x, y = rows(1)
    moments = Moments.of(x, y)
    assert moments.count == 1 and torch.equal(moments.mean_x, x[0]) and torch.equal(moments.mean_y, y[0])
    assert not moments.xx.any() and not moments.xy.any() and moments.yy == 0


def test_no_token_leaves_moments_empty() -> None:
    x, y = rows(0)
    moments = Moments.of(x, y)
    assert (moments.count, moments.yy) == (0, 0.0)
    assert not any(each.any() for each in (moments.mean_x, moments.mean_y, moments.xx, moments.xy))


@pytest.mark.parametrize(("left", "right"), [(40, 50), (0, 90), (90, 0), (1, 89)])
def test_merged_moments_are_those_of_both(left: int, right: int) -> None:
    x, y = rows(90, mean=-2)
    moments, other = Moments.of(x[:left], y[:left]), Moments.of(x[left:], y[left:])
    before = state(other)
    moments.merge(other)
    assert_moments(moments, x, y)
    assert_same_state(state(other), before)
    # Nor do they share storage: what is added to one later is not the other's.
    moments.add(x[:5], y[:5])
    assert_same_state(state(other), before)


@pytest.mark.parametrize("fade", [0.9, 0.25])
def test_faded_tokens_weigh_less(fade: float) -> None:
    (x, y), later = rows(40), rows(30, mean=5.0, seed=7)
    moments = Moments.of(x, y)
    moments.add(*later, fade=fade)
    weights = x.new_tensor([fade] * 40 + [1.0] * 30)[:, None]
    x, y = torch.cat([x, later[0]]), torch.cat([y, later[1]])
    count = float(weights.sum())
    mean_x, mean_y = (weights * x).sum(0) / count, (weights * y).sum(0) / count
    x, y = (x - mean_x) * weights.sqrt(), (y - mean_y) * weights.sqrt()
    expected = {"mean_x": mean_x, "mean_y": mean_y, "xx": x.mT @ x, "xy": x.mT @ y, "yy": y.square().sum()}
    assert moments.count == pytest.approx(count)
    for name, value in expected.items():
        actual = torch.as_tensor(getattr(moments, name), dtype=torch.float64)
        assert_close_rms(actual, value, torch.float64, name=name)


def test_a_constant_input_has_no_variance_however_large() -> None:
    x, y = rows(64, torch.float32)
    x[:, 2] = 12345.678
    moments = streamed(x, y, [16, 1, 30, 17])
    assert float(moments.xx[2].abs().max()) < 1e-4 * float(moments.xx.diagonal().max())


@pytest.mark.parametrize("drift", [0.0, 3.0], ids=["", "drifting"])
@pytest.mark.parametrize("batch", [2000, 50, 2])
def test_a_mean_large_beside_its_spread_loses_no_digits(batch: int, drift: float) -> None:
    """With a mean ten thousand times the spread, sums of plain squares in fp32 would have no digit right.

    Where a drifting mean is kept in fp32, it stops to move once a batch moves it by less than its last digit.
    """
    x, y = (each.float() for each in rows(4000))
    x, y = x + 1e4 + drift * torch.linspace(0, 1, 4000)[:, None], y - 1e4
    moments = streamed(x, y, [batch] * (4000 // batch))
    assert moments.xx.dtype == torch.float32
    assert_moments(moments, x, y, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_summed_in_fp32(dtype: torch.dtype) -> None:
    x, y = rows(3000, dtype, mean=1)
    moments = streamed(x, y, [1000, 2000])
    assert {moments.xx.dtype, moments.xy.dtype} == {torch.float32}
    assert_moments(moments, x, y, torch.float32)


def test_autocast_does_not_round_the_products() -> None:
    x, y = rows(500, torch.float32, mean=1)
    with torch.autocast("cpu", torch.bfloat16):
        moments = Moments.of(x, y)
    assert_moments(moments, x, y, torch.float32)


def test_no_graph_is_kept_and_the_rows_stay_as_they_are() -> None:
    x, y = rows(20)
    before = x.clone(), y.clone()
    moments = Moments.of(x.requires_grad_(), y)
    moments.add(x, y)
    assert not moments.xx.requires_grad and not moments.mean_x.requires_grad
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])


@pytest.mark.parametrize("where", ["x", "y"])
@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (float("nan"), torch.float64),
        (float("inf"), torch.float64),
        (-float("inf"), torch.bfloat16),
        (1e30, torch.float32),
    ],
)
def test_what_is_not_finite_is_refused_and_changes_nothing(value: float, dtype: torch.dtype, where: str) -> None:
    """The last: its square is out of range."""
    x, y = rows(30, dtype)
    moments = Moments.of(x, y)
    before = state(moments)
    bad_x, bad_y = x.clone(), y.clone()
    (bad_x if where == "x" else bad_y)[7, 1] = value
    with pytest.raises(NonFiniteActivation, match="NaN or infinity"):
        moments.add(bad_x, bad_y)
    assert_same_state(state(moments), before)
    moments.add(x, y)
    assert moments.count == 60
