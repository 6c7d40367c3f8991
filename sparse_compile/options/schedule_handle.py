"""What the option `schedule` takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class ScheduleHandle(Protocol):
    """A handle on the position of one training run; `sparse_compile.Schedule` is the one that users make.

    Attributes:
        step: optimizer steps taken so far.
        total_steps: optimizer steps of the whole run; None where nobody said.
    """

    step: int
    total_steps: int | None

    @property
    def position_given(self) -> bool:
        """Whether the position was ever set from outside."""

    def set_position(self, step: int, total_steps: int | None) -> None:
        """Set step and total at once."""

    def note_forward(self) -> None:
        """Note that a training forward has run."""

    def note_step(self) -> bool:
        """Count an optimizer step; return whether it counted."""

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Call a bound method after every change of the position, for as long as its object lives."""

    def unsubscribe(self, listener: Callable[[], None]) -> None:
        """Undo `subscribe`."""
