"""Say where a training run stands, and in which part of it the sparse function is trained.

The position is counted in optimizer steps that have been taken: at position 0 the first step is being computed. The
part that is trained sparsely is a half-open window `[first, last)` of positions, dense before it and after it
(SparseLoRA, arXiv 2506.16500: the first steps of a run are the ones that are sensitive to sparsity).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Any, Final, Literal, TypeAlias

from sparse_compile.options.presets import DEFAULT_START_FRACTION, DEFAULT_START_STEPS

__all__ = ["DENSE", "SPARSE", "STATE_LOCK", "Phase", "Schedule", "phase_at", "sparse_positions", "sparse_window"]

Phase: TypeAlias = Literal["dense", "sparse"]
"""Which function a training forward computes."""

DENSE: Final = "dense"
SPARSE: Final = "sparse"

STATE_LOCK: Final = threading.RLock()
"""Guards every schedule and session. One lock for all, so that none can be taken in the wrong order; re-entrant,
because a parameter may be collected, and its session told so, while the lock is held."""


def sparse_window(total: int | None, start: float | None, end: float | None) -> tuple[int, int | None] | None:
    """Return the first sparse position and the first dense one after it, in optimizer steps.

    A `float` is a fraction of the run, an `int` a number of steps: `1` is one step, `1.0` the whole run. Fractions are
    taken in exact decimal arithmetic (0.07 of 100 steps is 7, not the 8 that binary rounding would give) and rounded
    towards dense: `start` up (ceiling), `end` down (floor), so that no step that lies only partly inside is sparse.

    Args:
        total: optimizer steps of the whole run; None where nobody said.
        start: where sparsity begins; None for `DEFAULT_START_FRACTION` of a known total, else `DEFAULT_START_STEPS`.
        end: where it ends; None for never.

    Returns:
        `(first, last)`, `last` None for no end; None where a fraction was given and the total is not known. A window
        with `last <= first` is empty.
    """
    if total is None and (isinstance(start, float) or isinstance(end, float)):
        return None
    if start is None:
        start = DEFAULT_START_STEPS if total is None else DEFAULT_START_FRACTION
    first = _in_steps(start, total, ROUND_CEILING)
    return first, None if end is None else _in_steps(end, total, ROUND_FLOOR)


def phase_at(
    step: int, total: int | None, start: float | None, end: float | None, dense_every: int | None = None
) -> Phase:
    """Return the phase at a position of a run: sparse inside `sparse_window(total, start, end)`, else dense.

    Args:
        step: optimizer steps taken so far.
        total: optimizer steps of the whole run; None where nobody said.
        start: as in `sparse_window`.
        end: as in `sparse_window`.
        dense_every: of how many positions of the window the last is dense; None where none is.

    Returns:
        `"sparse"` where `first <= step < last`; `"dense"` elsewhere, and where the window cannot be known.
    """
    window = sparse_window(total, start, end)
    if window is None:
        return DENSE
    first, last = window
    inside = first <= step and (last is None or step < last)
    in_between = dense_every is not None and (step - first) % dense_every == dense_every - 1
    return SPARSE if inside and not in_between else DENSE


def sparse_positions(
    start: int, stop: int, window: tuple[int, int | None] | None, dense_every: int | None = None
) -> int:
    """Return how many positions from `start` up to but not including `stop` are sparse, by `phase_at`.

    Args:
        start: the first position, in optimizer steps.
        stop: the first one after the last.
        window: of `sparse_window`; None for no sparse position.
        dense_every: as in `phase_at`.
    """
    if window is None:
        return 0
    first, last = window
    begin, end = (max(each, first) - first for each in (start, stop if last is None else min(stop, last)))
    if end <= begin:
        return 0
    in_between = 0 if dense_every is None else end // dense_every - begin // dense_every
    return end - begin - in_between


def _in_steps(position: float, total: int | None, rounding: str) -> int:
    """Turn a fraction or a number of steps into a number of steps."""
    if isinstance(position, int):
        return position
    assert total is not None
    # float() first: a NumPy float has a repr of its own. repr() is the shortest decimal that names the number.
    return int((Decimal(repr(float(position))) * total).to_integral_value(rounding))


class Schedule:
    """Hold the position of one training run.

    Optimizer steps are counted without any help from the training loop. A schedule is given to the backend (the option
    `schedule`) to say what the loop alone knows: the length of the run, and where a resumed run stands.

        schedule = Schedule(total_steps=1000)
        model.compile(backend="sparselora", options={"start_step": 0.1, "schedule": schedule})
        schedule.step = 400  # a run that resumes; the steps that follow are counted from there

    Assign positions, do not add to them: `schedule.step += 1` after a step that was counted counts it twice.

    Attributes:
        step: optimizer steps taken so far.
        total_steps: optimizer steps of the whole run, or None.

    Raises:
        ValueError: `total_steps` is not a positive integer, or `step` is a negative number or no integer.
    """

    def __init__(self, total_steps: int | None = None) -> None:
        self._step = 0
        self._total_steps = _checked_total(total_steps)
        self._position_given = False
        self._forward_since_step = False
        self._listeners: list[weakref.WeakMethod[Callable[[], None]]] = []

    @property
    def step(self) -> int:
        """Optimizer steps taken so far."""
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        self.set_position(step, self._total_steps)

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the whole run; None where nobody said."""
        return self._total_steps

    @total_steps.setter
    def total_steps(self, total_steps: int | None) -> None:
        total_steps = _checked_total(total_steps)
        with STATE_LOCK:
            if total_steps != self._total_steps:
                self._total_steps = total_steps
                self._notify()

    @property
    def position_given(self) -> bool:
        """Whether the position was ever set from outside, so that it does not rest on counted steps alone."""
        return self._position_given

    def set_position(self, step: int, total_steps: int | None) -> None:
        """Set step and total at once: what listens never sees the one without the other.

        Args:
            step: optimizer steps taken so far.
            total_steps: optimizer steps of the whole run; None where nobody knows.

        Raises:
            ValueError: `step` is a negative number or no integer, or `total_steps` is not a positive integer.
        """
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"step must be an integer >= 0 (optimizer steps taken so far), got {step!r}")
        total_steps = _checked_total(total_steps)
        with STATE_LOCK:
            self._position_given = True
            if (step, total_steps) != (self._step, self._total_steps):
                self._step, self._total_steps = step, total_steps
                self._notify()

    def note_forward(self) -> None:
        """Note that a training forward has run: the next optimizer step counts."""
        self._forward_since_step = True

    def note_step(self) -> bool:
        """Count an optimizer step, unless no training forward has run since the last that was counted.

        One step of training may be seen several times: a subclass whose `step` calls `super().step()` fires torch's
        hook twice, and an optimizer per parameter fires it once per parameter.

        Returns:
            Whether the step was counted.
        """
        with STATE_LOCK:
            if not self._forward_since_step:
                return False
            self._forward_since_step = False
            self._step += 1
            self._notify()
            return True

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Call a bound method after every change of the position, for as long as its object lives."""
        with STATE_LOCK:
            self._listeners.append(weakref.WeakMethod(listener))

    def unsubscribe(self, listener: Callable[[], None]) -> None:
        """Undo `subscribe`."""
        with STATE_LOCK:
            self._listeners = [ref for ref in self._listeners if ref() is not None and ref() != listener]

    def __repr__(self) -> str:
        return f"Schedule(total_steps={self._total_steps}, step={self._step})"

    def __getstate__(self) -> dict[str, Any]:
        # A copy stands where the original stood, but steers no model: its listeners belong to the original.
        return {**self.__dict__, "_listeners": []}

    def _notify(self) -> None:
        """Tell every listener that is still alive."""
        for ref in self._listeners:
            listener = ref()
            if listener is not None:
                listener()


def _checked_total(total_steps: int | None) -> int | None:
    """Return a total that is None or a positive integer."""
    if total_steps is None:
        return None
    if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
        raise ValueError(f"total_steps must be a positive integer (optimizer steps of the run), got {total_steps!r}")
    return total_steps
