"""Numbers that are compared differ on paper, and a reason of cost is known again."""

from __future__ import annotations

import math

import pytest

from sparse_compile.graph.cost_note import cost_note, is_cost_note, told_apart


@pytest.mark.parametrize(
    ("first", "second", "shown"),
    [
        (1.0, 2.0, ("1", "2")),
        (442_368.0, 442_411.0, ("4.4237e+05", "4.4241e+05")),
        (123.4, 456.7, ("123", "457")),
        (2.5, 2.5, ("2.5", "2.5")),
        (1.0, math.nextafter(1.0, 2.0), ("1", "1.0000000000000002")),
    ],
)
def test_as_many_digits_as_it_takes(first: float, second: float, shown: tuple[str, str]) -> None:
    assert told_apart(first, second) == shown


def test_a_note_is_known_again() -> None:
    note = cost_note(442_368.0, 442_411.0)
    assert note == "saves 4.4237e+05 FLOPs a token and costs the time of 4.4241e+05"
    assert is_cost_note(note)
    assert not is_cost_note("the weight of layers.0.up is not finite") and not is_cost_note("")
