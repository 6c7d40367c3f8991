"""Training forwards since the last optimizer step."""

from __future__ import annotations

from sparse_compile.training.forwards import ForwardCount


def test_the_first_graph_since_a_step_counts() -> None:
    forwards = ForwardCount()
    assert [forwards.note(key) for key in ("one", "two", "two", "one")] == [True, False, False, True]
    assert forwards.number == 2
    forwards.stand_at(0)
    assert forwards.number == 2
    forwards.stand_at(1)
    assert forwards.number == 0
    assert [forwards.note(key) for key in ("two", "one")] == [True, False]
