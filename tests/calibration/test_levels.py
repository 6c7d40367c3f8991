"""Which levels of a block are worth a try: the lower convex hull of saving and missed energy."""

from __future__ import annotations

import math

import pytest

from sparse_compile.calibration.levels import Level, worthwhile


def ranks(*levels: tuple[int, float, float]) -> list[int]:
    return [each.rank for each in worthwhile(Level(*each) for each in levels)]


def test_the_hull_goes_from_what_loses_least_for_its_saving_to_what_saves_most() -> None:
    # Energies .25, .36, .64 and 1 for savings .8, .9, .955 and 1.01: slopes .31, 1.1, 5.1, 6.5.
    assert ranks((128, 0.5, 0.8), (64, 0.6, 0.9), (8, 0.8, 0.955), (0, 1.0, 1.01)) == [128, 64, 8, 0]


def test_what_saves_less_and_loses_as_much_is_left_out() -> None:
    assert ranks((64, 0.5, 0.6), (32, 0.5, 0.8)) == [32]
    assert ranks((64, 0.5, 0.6), (32, 0.4, 0.8)) == [32]


def test_what_lies_above_the_line_between_two_others_is_left_out() -> None:
    assert ranks((64, 0.5, 0.8), (16, 0.95, 0.9), (0, 1.0, 1.0)) == [64, 0]


def test_a_saving_that_is_hardly_larger_is_no_level() -> None:
    assert ranks((64, 0.5, 0.96), (0, 1.0, 1.0)) == [64]
    assert ranks((64, 0.5, 0.94), (0, 1.0, 1.0)) == [64, 0]


@pytest.mark.parametrize("level", [(8, 0.5, 0.0), (8, 0.5, -0.1), (8, math.inf, 0.5)])
def test_what_saves_nothing_or_has_no_error_is_no_level(level: tuple[int, float, float]) -> None:
    assert ranks(level) == []
    assert ranks(level, (4, 0.7, 0.5)) == [4]


def test_a_map_without_error_comes_first_whatever_it_saves() -> None:
    assert ranks((32, 0.0, 0.1), (0, 1.0, 1.0)) == [32, 0]
