"""Publish the phase of a model to where its compiled graphs read it.

A dense step is a step in which every token counts as an output token. A graph reads that from a tensor, which is
written in place: one executable serves both phases, and a change of phase costs nothing. Only a graph of fixed sizes is
for one phase: Dynamo guards on `PHASES`.

The phase changes between a backward and the next forward only, so that the recomputation of a checkpoint computes what
its forward did.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from sparse_compile.torch_private.autograd import after_backward, running_backward
from sparse_compile.training.schedule import DENSE, Phase

__all__ = ["PHASES", "PublishedPhase"]

PHASES: Final[dict[int, Phase]] = {}
"""The phase that each living session's next forward computes: `Session.id` to `"dense"` or `"sparse"`, for guards.

Entries go with their models.
"""


class PublishedPhase:
    """What the graphs of one model read the phase from: an entry in `PHASES`, and a tensor on each device.

    Every method is to be called with `STATE_LOCK` held.

    Args:
        key: the entry in `PHASES`.
    """

    def __init__(self, key: int) -> None:
        self._keys = [key]
        self._flags: list[Tensor] = []
        self._waiting_for: int | None = None

    def dense_step(self, device: torch.device, phase: Phase) -> Tensor:
        """Return the tensor of a device, made with this phase on first use: bool, without dimensions, true if dense."""
        for flag in self._flags:
            if flag.device == device:
                return flag
        with torch.inference_mode(mode=False):
            self._flags.append(torch.tensor(phase == DENSE, device=device))
        return self._flags[-1]

    def between_steps(self, publish: Callable[[], None]) -> None:
        """Call `publish` as soon as the phase may change: now, or when the backward that this thread runs has ended.

        What was never published is published at once.
        """
        backward = running_backward()
        if backward is None or any(key not in PHASES for key in self._keys):
            publish()
        elif self._waiting_for != backward:
            # An optimizer that steps inside the backward. A backward that fails runs no callbacks, so remember which
            # one was asked, not merely that one was.
            self._waiting_for = backward
            after_backward(publish)

    def write(self, phase: Phase) -> None:
        """Have the next forward compute this phase."""
        PHASES.update(dict.fromkeys(self._keys, phase))
        for flag in self._flags:
            flag.fill_(phase == DENSE)

    def withdraw(self) -> None:
        """Take the entries out of `PHASES`: the model is gone."""
        for key in self._keys:
            PHASES.pop(key, None)

    def absorb(self, other: PublishedPhase) -> None:
        """Publish to the graphs of another model too, which turned out to be this one; the other publishes no more."""
        self._keys += other._keys
        self._flags += other._flags
        other._keys, other._flags = [], []
