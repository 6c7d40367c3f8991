"""Put numbers of our own into what a `transformers.Trainer` logs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import Trainer, TrainerCallback

__all__ = ["added_to_logs"]


@contextmanager
def added_to_logs(callback: TrainerCallback, numbers: Callable[[], Mapping[str, float]]) -> Iterator[None]:
    """Have what the trainer of a callback logs of its training hold these numbers too, while the block runs.

    A callback's own `on_log` would come too late: a user's callbacks are called after those that report to TensorBoard,
    W&B or MLflow, and it is not told which trainer calls it. So `Trainer.log` itself is wrapped.

    Args:
        callback: one of the trainer's callbacks.
        numbers: returns what to add, by name. It is called once for each log of a training loss.
    """
    log = Trainer.log
    over = False

    @functools.wraps(log)
    def log_with_numbers(trainer: Trainer, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if not over and "loss" in logs and callback in trainer.callback_handler.callbacks:
            logs.update(numbers())
        log(trainer, logs, *args, **kwargs)

    Trainer.log = log_with_numbers  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        over = True
        if Trainer.log is log_with_numbers:  # else another run has wrapped it since, and goes on
            Trainer.log = log  # type: ignore[method-assign]
