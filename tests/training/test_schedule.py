"""Where a training run stands, and in which part of it the sparse function is trained."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

from noting_model import DENSE, NO_UNEXPECTED_WARNING, SPARSE, NotingModel
from sparse_compile.training.schedule import Schedule, phase_at, sparse_positions, sparse_window

pytestmark = NO_UNEXPECTED_WARNING


class TestPhaseAt:
    @pytest.mark.parametrize(
        ("total", "start", "end", "window"),
        [
            (100, None, None, (5, None)),
            (None, None, None, (20, None)),
            (None, None, 30, (20, 30)),
            (None, 0, None, (0, None)),
            (None, 3, None, (3, None)),
            (None, 0, 10, (0, 10)),
            (100, 0.1, 0.9, (10, 90)),
            # An integer is steps, a float a fraction, at 0 and 1 too.
            (100, 1, None, (1, None)),
            (100, 1.0, None, (100, None)),
            (100, 0.0, 1.0, (0, 100)),
            (100, 0, 1, (0, 1)),
            # Start rounds up, end rounds down.
            (7, 0.5, 0.5, (4, 3)),
            (19, None, None, (1, None)),
            (21, None, None, (2, None)),
            # Decimal arithmetic: in binary 0.07 * 100 > 7 and 0.29 * 100 < 29.
            (100, 0.07, 0.29, (7, 29)),
            # A fraction without a total.
            (None, 0.1, None, None),
            (None, 5, 0.9, None),
            (None, None, 0.9, None),
        ],
    )
    @pytest.mark.usefixtures("default_start")
    def test_window(
        self, total: int | None, start: float | None, end: float | None, window: tuple[int, int | None] | None
    ) -> None:
        assert sparse_window(total, start, end) == window

    def test_the_window_is_half_open(self) -> None:
        assert [phase_at(step, None, 2, 4) for step in range(6)] == [DENSE, DENSE, SPARSE, SPARSE, DENSE, DENSE]

    def test_unknown_and_empty_windows_are_dense(self) -> None:
        assert phase_at(50, None, 0.1, None) == DENSE
        phases = [phase_at(step, None, 2, 9, 3) for step in range(11)]
        assert phases == [DENSE] * 2 + [SPARSE, SPARSE, DENSE] * 2 + [SPARSE] + [DENSE] * 2, "the last of each three"
        assert {phase_at(step, 7, 0.5, 0.5) for step in range(8)} == {DENSE}

    @pytest.mark.parametrize("every", [None, 2, 3, 8])
    @pytest.mark.parametrize(("start", "end"), [(0, None), (2, 9), (5, 3), (7, 30), (0.1, None)])
    def test_sparse_positions_are_counted(self, start: float, end: float | None, every: int | None) -> None:
        window = sparse_window(None, start, end)
        for begin in range(12):
            for stop in range(20):
                phases = [phase_at(step, None, start, end, every) for step in range(begin, stop)]
                assert sparse_positions(begin, stop, window, every) == phases.count(SPARSE)

    def test_a_whole_run(self) -> None:
        phases = [phase_at(step, 20, None, None) for step in range(20)]
        assert phases == [DENSE] + [SPARSE] * 19


class TestSchedule:
    def test_defaults(self) -> None:
        schedule = Schedule()
        assert (schedule.step, schedule.total_steps, schedule.position_given) == (0, None, False)
        assert "step=0" in repr(schedule)

    @pytest.mark.parametrize("total", [0, -1, 1.5, True, "10"])
    def test_total_is_a_positive_integer(self, total: Any) -> None:
        with pytest.raises(ValueError, match="total_steps must be a positive integer"):
            Schedule(total)
        schedule = Schedule(5)
        with pytest.raises(ValueError, match="total_steps"):
            schedule.total_steps = total
        assert schedule.total_steps == 5

    @pytest.mark.parametrize("step", [-1, 0.5, True, None])
    def test_step_is_an_integer_from_zero(self, step: Any) -> None:
        schedule = Schedule()
        with pytest.raises(ValueError, match="step must be an integer >= 0"):
            schedule.step = step
        assert schedule.step == 0

    def test_a_step_counts_once_between_two_forwards(self) -> None:
        schedule = Schedule()
        assert not schedule.note_step()
        schedule.note_forward()
        schedule.note_forward()
        assert schedule.note_step()
        assert not schedule.note_step()
        schedule.note_forward()
        assert schedule.note_step()
        assert schedule.step == 2
        assert not schedule.position_given

    def test_listeners_see_step_and_total_change_together_and_only_changes(self) -> None:
        class Listener:
            def __init__(self) -> None:
                self.seen: list[tuple[int, int | None]] = []

            def changed(self) -> None:
                self.seen.append((schedule.step, schedule.total_steps))

        schedule, listener = Schedule(), Listener()
        schedule.subscribe(listener.changed)
        schedule.set_position(3, 10)
        schedule.set_position(3, 10)
        schedule.total_steps = 10
        schedule.total_steps = 20
        assert listener.seen == [(3, 10), (3, 20)]
        schedule.unsubscribe(listener.changed)
        schedule.step = 9
        assert len(listener.seen) == 2

    def test_a_copy_stands_where_the_original_stood_and_steers_nothing(self) -> None:
        model = NotingModel(start_step=5, schedule=Schedule(10))
        session = model.session
        for clone in (copy.deepcopy(session.schedule), pickle.loads(pickle.dumps(session.schedule))):
            assert clone.total_steps == 10
            clone.step = 7
            assert session.phase == DENSE
        session.schedule.step = 7
        assert session.phase == SPARSE
