"""Tell the user of a schedule that does not know the length of the run, or that does not move."""

from __future__ import annotations

import warnings
from typing import Final

from sparse_compile.options.schedule_handle import ScheduleHandle
from sparse_compile.training.schedule import Phase, sparse_window
from sparse_compile.training.told import Told

__all__ = ["FORWARDS_BEFORE_WARNING", "tell_about_missing_steps", "tell_about_start"]

FORWARDS_BEFORE_WARNING: Final = 100
"""Training forwards without an optimizer step after which the user is told that no step was seen."""


def tell_about_start(schedule: ScheduleHandle, start: float | None, end: float | None, told: Told) -> None:
    """Warn once where a schedule that does not know the length of the run never becomes sparse.

    Args:
        schedule: the position of the run.
        start: where sparsity begins, as in `sparse_window`.
        end: where it ends, as in `sparse_window`.
        told: what the model was told.
    """
    if schedule.total_steps is not None:
        return
    window = sparse_window(None, start, end)
    if window is None:
        if told.once("a fraction without a total"):
            warnings.warn(
                f"start_step={start}, end_step={end} holds a fraction of the run, and the length of the run is not "
                "known: training stays dense. Add SparseLoRACallback() to the Trainer's callbacks, or pass the "
                "option schedule=Schedule(total_steps=...), or give numbers of steps (an int).",
                stacklevel=3,
            )
    elif start is None and window[1] is not None and window[1] <= window[0] and told.once("an end before the default"):
        warnings.warn(
            f"end_step={end} does not lie behind step {window[0]}, where sparse training starts because the length of "
            "the run is not known: training stays dense. Give start_step as a number of steps (an int).",
            stacklevel=3,
        )


def tell_about_missing_steps(schedule: ScheduleHandle, phase: Phase, forwards: int, told: Told) -> None:
    """Say once that the schedule does not move.

    Args:
        schedule: the position of the run.
        phase: the phase that it stands in.
        forwards: training forwards since the last optimizer step.
        told: what the model was told.
    """
    if forwards < FORWARDS_BEFORE_WARNING or schedule.position_given:
        return
    if told.once("no optimizer step seen"):
        warnings.warn(
            f"{FORWARDS_BEFORE_WARNING} training forwards ran and no optimizer step was seen: the schedule stands "
            f"at step {schedule.step} ({phase}). Steps are seen of a torch.optim.Optimizer that holds "
            "the trained parameters themselves. For any other, add SparseLoRACallback() to the Trainer's callbacks "
            "or set the step of a Schedule after each step (option schedule). Ignore this if you accumulate "
            "gradients over that many forwards.",
            stacklevel=3,
        )
