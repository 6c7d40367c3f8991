"""Maps that are fitted while a model trains: what they are fitted to, and that their buffers are written in place."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sparse_compile.options.recipe import AffineMap
from sparse_compile.surrogates.fit import fit_maps, held_out_error
from sparse_compile.surrogates.moments import Moments, NonFiniteActivation
from sparse_compile.surrogates.online import FADE, OnlineMap

WIDTH, OUT, RANK = 12, 10, 3


def buffers(rank: int = RANK, dtype: torch.dtype = torch.float64) -> AffineMap:
    shapes = ((rank, WIDTH), (OUT, rank), (OUT,))
    return AffineMap(*(torch.zeros(shape, dtype=dtype) for shape in shapes))


def block(seed: int = 0, noise: float = 0.1) -> tuple[Tensor, Tensor, float]:
    """A linear block of falling singular values, so that its leading directions are its own."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q for n in (WIDTH, OUT))
    values = torch.diag(0.5 ** torch.arange(OUT, dtype=torch.float64))
    return left[:, :OUT] @ values @ right, torch.full((OUT,), 2.0, dtype=torch.float64), noise


def rows(count: int, seed: int, of: tuple[Tensor, Tensor, float]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64) + 1
    weight, bias, noise = of
    return x, x @ weight + bias + noise * torch.randn(count, OUT, generator=generator, dtype=torch.float64)


def warmed_up(of: tuple[Tensor, Tensor, float], batches: int = 8) -> OnlineMap:
    online = OnlineMap(buffers())
    for seed in range(batches):
        online.collect(*rows(100, seed, of))
    return online


def test_the_first_fit_is_that_of_all_tokens_with_each_fourth_batch_held_out() -> None:
    online = warmed_up(block())
    before = online.surrogate.q.data_ptr()
    assert online.ready and online.pending and not online.fitted and math.isnan(online.error)
    online.fit()
    train, held_out = Moments.empty(WIDTH, OUT, online.surrogate.q), Moments.empty(WIDTH, OUT, online.surrogate.q)
    for seed in range(8):
        (held_out if seed % 4 == 3 else train).add(*rows(100, seed, block()))
    expected = fit_maps(train, held_out, [RANK])[RANK]
    for part in ("q", "u", "bias"):
        torch.testing.assert_close(getattr(online.surrogate, part), getattr(expected.map, part))
    assert online.error == expected.error and online.fitted and not online.pending
    assert online.surrogate.q.data_ptr() == before, "a compiled graph reads these very buffers"


def test_a_refit_follows_a_block_that_changes() -> None:
    online = warmed_up(block())
    online.fit()
    other = block(seed=5)
    online.collect(*rows(100, 50, other))
    assert online.error > 1, "the error is that of the map on tokens of now"
    for seed in range(60):
        online.collect(*rows(100, 51 + seed, other))
        online.fit()
    unseen = Moments.of(*rows(2000, 999, other))
    best = fit_maps(Moments.of(*rows(2000, 998, other)), unseen, [RANK])[RANK]
    assert held_out_error(online.surrogate, unseen) < best.error + 0.02


def test_a_refit_to_the_same_tokens_changes_little() -> None:
    online = warmed_up(block())
    online.fit()
    x = rows(50, 77, block())[0]
    before = online.surrogate(x)
    online._train.merge(online._train)  # the same moments twice are the same moments
    online.fit()
    torch.testing.assert_close(online.surrogate(x), before, rtol=0.05, atol=0.05)


def test_older_tokens_fade_only_once_there_is_a_map() -> None:
    online = warmed_up(block())
    assert online.tokens == 600
    online.fit()
    assert online.tokens == 800
    online.collect(*rows(100, 8, block()))
    assert online.tokens == pytest.approx(800 * FADE + 100)
    online.collect(*rows(100, 9, block()))
    assert online.tokens == pytest.approx(800 * FADE + 200), "once a step, of however many batches it is"


def test_of_many_rows_evenly_spaced_ones_are_taken() -> None:
    online = OnlineMap(buffers())
    online.collect(*rows(3000, 0, block()))
    assert online.tokens == 512
    few = OnlineMap(buffers())
    few.collect(*rows(500, 0, block()))
    assert few.tokens == 500
    wide = OnlineMap(AffineMap(torch.zeros(4, 1300), torch.zeros(OUT, 4), torch.zeros(OUT)))
    wide.collect(torch.randn(3000, 1300), torch.randn(3000, OUT))
    assert wide.tokens == 650


@pytest.mark.parametrize("batches", [0, 3])
def test_without_tokens_to_fit_on_and_others_to_check_with_it_is_not_ready(batches: int) -> None:
    assert not warmed_up(block(), batches).ready


def test_what_is_not_finite_is_refused_and_what_was_there_stays() -> None:
    online = warmed_up(block())
    x, y = rows(10, 0, block())
    y[3, 2] = math.nan
    with pytest.raises(NonFiniteActivation):
        online.collect(x, y)
    assert online.tokens == 600


def test_a_block_that_returns_a_constant_gets_the_constant_and_refits_it() -> None:
    online = OnlineMap(buffers())
    for seed in range(4):
        online.collect(rows(100, seed, block())[0], torch.full((100, OUT), 3.0, dtype=torch.float64))
    online.fit()
    torch.testing.assert_close(online.surrogate.bias, torch.full((OUT,), 3.0, dtype=torch.float64))
    assert not online.surrogate.u.any() or not online.surrogate.q.any() or online.error == 0
    online.collect(*rows(100, 9, block()))
    online.fit()
    assert bool(online.surrogate.bias.isfinite().all())


def test_constant_inputs_leave_a_constant() -> None:
    online = OnlineMap(buffers())
    for seed in range(4):
        online.collect(torch.ones(100, WIDTH, dtype=torch.float64), rows(100, seed, block())[1])
    online.fit()
    assert not online.surrogate.q.any() and online.surrogate.bias.any()
    online.collect(torch.ones(100, WIDTH, dtype=torch.float64), rows(100, 9, block())[1])
    online.fit()
    assert bool(online.surrogate.bias.isfinite().all())


def test_buffers_in_16_bits_have_statistics_in_32() -> None:
    online = OnlineMap(buffers(dtype=torch.bfloat16))
    for seed in range(8):
        x, y = rows(100, seed, block())
        online.collect(x.bfloat16(), y.bfloat16())
    online.fit()
    x, y = rows(1000, 99, block())
    assert online._train.xx.dtype == torch.float32
    assert held_out_error(online.surrogate, Moments.of(x, y)) < 0.5


def test_forgetting_begins_anew() -> None:
    online = warmed_up(block())
    online.fit()
    online.forget()
    assert online.tokens == 0 and not online.ready


def test_a_map_that_was_given_is_not_replaced_by_one_of_few_tokens() -> None:
    given = OnlineMap(buffers(), fitted=True)
    for seed in range(4):
        given.collect(*rows(4 * RANK, seed, block()))
    assert not given.ready, "enough for a first map, not for a better one"
    given.collect(*rows(4 * WIDTH, 9, block()))
    assert given.ready
