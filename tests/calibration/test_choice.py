"""How forwards are shared out between the search and the check of what it found."""

from __future__ import annotations

import pytest

from sparse_compile.calibration.choice import _plan


@pytest.mark.parametrize("forwards", [9, 20, 60, 1000])
@pytest.mark.parametrize("sites", [1, 8, 64])
@pytest.mark.parametrize("held_out", [1, 3, 8])
def test_no_more_forwards_are_planned_than_there_are(forwards: int, sites: int, held_out: int) -> None:
    count, measurements, checks = _plan(forwards, sites, held_out)
    assert 1 <= count <= held_out and measurements >= 1 and checks >= 1
    assert measurements * count + checks * (held_out - count) <= forwards


def test_many_forwards_search_with_all_batches_and_few_with_one() -> None:
    assert _plan(1000, 8, 4) == (4, 250, 1)
    assert _plan(60, 32, 4) == (1, 51, 3)
    assert _plan(60, 8, 4) == (2, 27, 3)
