"""Fitted maps against direct solutions in fp64, and their errors against direct evaluation on held-out rows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models import normal
from sparse_compile.options.recipe import AffineMap
from sparse_compile.surrogates.fit import RIDGES, FittedMap, error_on, fit_maps, held_out_error
from sparse_compile.surrogates.moments import Moments
from tolerances import assert_close_rms

IN, OUT = 9, 7


def rows(count: int, seed: int, noise: float = 0.5) -> tuple[Tensor, Tensor]:
    """Draw pairs of rows with means of their own: a correlated x, and a y that is not linear in it."""
    x = normal(count, IN, seed=seed) @ normal(IN, IN, seed=50) + 2
    y = x @ normal(IN, OUT, seed=51) + 3 * x[:, :OUT].tanh() - 1 + noise * normal(count, OUT, seed=seed + 1)
    return x, y


def fit(train: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor], *ranks: int) -> dict[int, FittedMap]:
    return dict(fit_maps(Moments.of(*train), Moments.of(*held_out), ranks))


def direct(train: tuple[Tensor, Tensor], rank: int, ridge: float) -> AffineMap:
    """Solve the ridge regression of all rows, and project it on the leading directions of its fitted outputs.

    Those of the rows with the ridge's own rows below them: then the loss with the ridge is a plain sum of squares.
    """
    x, y = train
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    strength = ridge * x.square().sum(0).mean()
    below = strength.sqrt() * torch.eye(IN, dtype=x.dtype)
    x, y = torch.cat([x, below]), torch.cat([y, torch.zeros(IN, OUT, dtype=y.dtype)])
    full = torch.linalg.lstsq(x, y, driver="gelsd").solution
    directions = torch.linalg.svd(x @ full, full_matrices=False).Vh[:rank]
    q, u = directions @ full.mT, directions.mT
    return AffineMap(q, u, mean_y - u @ (q @ mean_x))


def evaluated(affine: AffineMap, rows: tuple[Tensor, Tensor]) -> float:
    x, y = rows
    return float(((affine(x) - y).square().sum() / (y - y.mean(0)).square().sum()).sqrt())


@pytest.mark.parametrize("tokens", [400, 12])
@pytest.mark.parametrize("rank", range(1, OUT + 1))
def test_maps_are_the_direct_solution(rank: int, tokens: int) -> None:
    """Of full rank that is ridge least squares, of lower rank reduced-rank regression by a dense SVD."""
    train, held_out = rows(tokens, 0), rows(100, 10)
    found = fit(train, held_out, *range(OUT + 1))[rank]
    expected = direct(train, rank, found.ridge)
    assert found.map.rank == rank
    assert_close_rms(found.map.u @ found.map.q, expected.u @ expected.q, name="map")
    assert_close_rms(found.map.bias, expected.bias, name="bias")
    errors = {ridge: evaluated(direct(train, rank, ridge), held_out) for ridge in RIDGES}
    assert found.ridge == min(errors, key=errors.__getitem__)
    assert found.error == pytest.approx(errors[found.ridge], rel=1e-9)


def test_a_map_of_full_rank_with_a_tiny_ridge_is_least_squares() -> None:
    train = rows(400, 0, noise=0)
    x, y = torch.cat([train[0], torch.ones(400, 1, dtype=torch.float64)], 1), train[1]
    expected = torch.linalg.lstsq(x, y).solution
    found = fit(train, rows(4000, 10, noise=0), OUT)[OUT]
    assert found.ridge <= 1e-4
    assert float((found.map(train[0]) - x @ expected).norm()) < 1e-2 * float((x @ expected - y).norm())


def test_a_map_is_asked_for_alone_or_with_others() -> None:
    train, held_out = rows(200, 0), rows(100, 10)
    together = fit(train, held_out, 5, 0, 2)
    assert list(together) == [5, 0, 2]
    for rank, each in together.items():
        alone = fit(train, held_out, rank)[rank]
        assert_close_rms(alone.map.u @ alone.map.q, each.map.u @ each.map.q)
        assert alone.error == pytest.approx(each.error)


@pytest.mark.parametrize("true", [1, 3])
def test_a_map_of_low_rank_is_found_exactly(true: int) -> None:
    exact = AffineMap(normal(true, IN, seed=1), normal(OUT, true, seed=2), normal(OUT, seed=3))
    x, held_out = rows(300, 0)[0], rows(100, 10)[0]
    found = fit((x, exact(x)), (held_out, exact(held_out)), true - 1, true, OUT)
    # What is missed is the smallest ridge's doing: a share of 1e-6 of a direction of average variance.
    assert found[true].ridge == RIDGES[0] and found[true].error < 1e-3
    assert found[true - 1].error > 0.02


@pytest.mark.parametrize("ranks", [(0,), (0, 3)])
def test_rank_zero_is_the_constant(ranks: tuple[int, ...]) -> None:
    train, held_out = rows(200, 0), rows(100, 10)
    constant = fit(train, held_out, *ranks)[0]
    assert (constant.map.rank, constant.ridge) == (0, 0)
    assert_close_rms(constant.map.bias, train[1].mean(0))
    assert constant.error == pytest.approx(evaluated(constant.map, held_out))
    assert fit(train, train, *ranks)[0].error == pytest.approx(1)
    assert torch.equal(constant.map(held_out[0]), constant.map.bias.expand(100, OUT))


@pytest.mark.parametrize("rank", [0, 1, 4])
def test_the_error_is_that_of_the_rows(rank: int) -> None:
    anything = AffineMap(normal(rank, IN, seed=1), normal(OUT, rank, seed=2), normal(OUT, seed=3))
    some = rows(50, 0)
    expected = pytest.approx(evaluated(anything, some), rel=1e-9)
    assert held_out_error(anything, Moments.of(*some)) == expected
    assert error_on(anything, *some) == expected


def test_few_tokens_choose_a_stronger_ridge() -> None:
    held_out = rows(500, 10, noise=4)
    few, many = (fit(rows(count, 0, noise=4), held_out, OUT)[OUT] for count in (IN + 2, 5000))
    assert few.ridge > many.ridge
    assert few.error > many.error
    weakest = direct(rows(IN + 2, 0, noise=4), OUT, RIDGES[0])
    assert few.error < 0.9 * evaluated(weakest, held_out)


def test_a_higher_rank_is_no_worse_on_the_tokens_of_the_fit() -> None:
    train = rows(300, 0)
    errors = [each.error for each in fit(train, train, *range(OUT + 1)).values()]
    assert errors == sorted(errors, reverse=True) and errors[0] == pytest.approx(1)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e3])
def test_a_constant_input_is_no_obstacle(value: float) -> None:
    train, held_out = rows(200, 0), rows(100, 10)
    for x, _ in (train, held_out):
        x[:, 3] = value
        x[:, 4] = x[:, 5]
    found = fit(train, held_out, 3, OUT)
    assert found[OUT].error <= found[3].error < 0.8
    assert found[OUT].error == pytest.approx(evaluated(found[OUT].map, held_out), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("value", [0.0, 0.1, -7.0])
def test_inputs_that_do_not_vary_give_the_constant(value: float, dtype: torch.dtype) -> None:
    """For tokens that do vary as well: the rounding of a mean is no direction to fit."""
    train, held_out = ([each.to(dtype) for each in rows(*of)] for of in ((200, 0), (100, 10)))
    found = fit((torch.full_like(train[0], value), train[1]), (torch.full_like(held_out[0], value), held_out[1]), 0, 3)
    assert_close_rms(found[3].map(held_out[0]), train[1].mean(0).expand(100, OUT), name="constant")
    assert found[3].error == pytest.approx(found[0].error)


@pytest.mark.parametrize("value", [0.0, 0.1, -7.0])
def test_outputs_that_do_not_vary_are_met(value: float) -> None:
    (x, y), (held_x, held_y) = rows(200, 0), rows(100, 10)
    found = fit((x, torch.full_like(y, value)), (held_x, torch.full_like(held_y, value)), 0, 3)
    for each in found.values():
        assert not math.isnan(each.error)
        torch.testing.assert_close(each.map(held_x), torch.full_like(held_y, value), rtol=1e-9, atol=1e-9)


def test_outputs_that_do_not_vary_and_are_missed_have_an_infinite_error() -> None:
    x, y = rows(100, 0)
    constant = Moments.of(x, torch.zeros_like(y))
    right, wrong = (AffineMap(x.new_zeros(0, IN), x.new_zeros(OUT, 0), x.new_full((OUT,), b)) for b in (0.0, 1.0))
    assert (held_out_error(right, constant), held_out_error(wrong, constant)) == (0.0, math.inf)


@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_fewer_tokens_than_the_rank_still_give_a_map(tokens: int) -> None:
    held_out = rows(100, 10)
    found = fit(rows(tokens, 0), held_out, 0, 6)
    assert found[6].map.q.shape[1] == IN and found[6].map(held_out[0]).isfinite().all()
    assert found[6].error == pytest.approx(evaluated(found[6].map, held_out), rel=1e-6)
    assert found[6].error <= found[0].error * 1.01


def test_ranks_above_the_width_give_the_width() -> None:
    found = fit(rows(200, 0), rows(100, 10), OUT, IN, 500)
    assert [each.map.rank for each in found.values()] == [OUT] * 3
    assert torch.equal(found[500].map.q, found[OUT].map.q)


def test_maps_have_the_dtype_of_the_moments() -> None:
    wide = fit(rows(200, 0), rows(100, 10), 3)[3]
    train, held_out = (tuple(each.bfloat16() for each in rows(*of)) for of in ((200, 0), (100, 10)))
    narrow = fit(train, held_out, 3)[3]
    assert (wide.map.q.dtype, narrow.map.q.dtype) == (torch.float64, torch.float32)
    assert narrow.error == pytest.approx(wide.error, rel=2e-2)


@pytest.mark.parametrize(("train", "held_out"), [(0, 10), (10, 0), (0, 0)])
def test_no_tokens_are_an_error(train: int, held_out: int) -> None:
    with pytest.raises(ValueError, match="context tokens"):
        fit(rows(train, 0), rows(held_out, 10), 2)
