"""Measure a training run while it goes on: what its dense and its sparse steps take, and what is left of it.

Nothing here waits for a device: on one, a step is bracketed by events, which are read when the trainer logs and so has
waited anyhow.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from sparse_compile.kernels.roles.reference import output_mask
from sparse_compile.training.schedule import DENSE, SPARSE, Phase
from sparse_compile.training.session import Session

__all__ = ["RunNumbers"]

_KEPT: Final = 64
"""Of each phase, the steps that speeds are medians of: what a run was like long ago is no measure of what is left."""

_FEW_CONTEXT: Final = 0.3
_LITTLE_GAIN: Final = 1.05


@dataclass
class _Step:
    """An optimizer step.

    Attributes:
        phase: which function it computed.
        begin, end: by the clock of its device.
        tokens: number of tokens that the model was called with; 0 where it was not seen.
        compiled: whether a graph was compiled in it, so that its time is none of a step's.
    """

    phase: Phase
    begin: Any
    end: Any = None
    tokens: int = 0
    compiled: bool = False


class _Clock:
    """A device's time, in seconds."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> Any:
        if self._device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        return event

    @staticmethod
    def between(begin: Any, end: Any) -> float:
        if isinstance(begin, float):
            return float(end - begin)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


class RunNumbers:
    """What is known of a run by its steps so far.

    Args:
        session: of the model.
        device: where the model is.
    """

    def __init__(self, session: Session, device: torch.device) -> None:
        self._session = session
        self._clock = _Clock(device)
        self._step: _Step | None = None
        self._graphs = 0
        self._unread: list[_Step] = []
        # Seconds and tokens of each step.
        self._timed: dict[Phase, deque[tuple[float, int]]] = {each: deque(maxlen=_KEPT) for each in (DENSE, SPARSE)}
        self._compiling: list[float] = []
        self._steps: dict[Phase, int] = {DENSE: 0, SPARSE: 0}
        self._logged: dict[Phase, int] = {DENSE: 0, SPARSE: 0}
        self._tokens = 0
        self._output: int | Tensor = 0
        self._context: list[float] = []

    def begin(self) -> None:
        """Begin an optimizer step."""
        self._graphs = len(self._session.reports)
        self._step = _Step(self._session.phase, self._clock.now())

    def computed(self) -> None:
        """Note that the gradients of the step are there: its graph is compiled, and the position is still its own."""
        if self._step is not None:
            self._step.phase = self._session.phase

    def called_with(self, labels: Tensor, ignore_index: int) -> None:
        """Note the labels of a training forward.

        Args:
            labels: (B, S) integers, on any device.
            ignore_index: the label that carries no loss.
        """
        if self._step is not None:
            self._step.tokens += labels.numel()
        self._tokens += labels.numel()
        # A tensor on a GPU is added up there.
        output = output_mask(labels, ignore_index, 1).sum()
        self._output = self._output + (int(output) if labels.device.type == "cpu" else output)

    def end(self) -> None:
        """End the optimizer step that was begun."""
        step, self._step = self._step, None
        if step is None:
            return
        step.end = self._clock.now()
        step.compiled = len(self._session.reports) != self._graphs
        self._steps[step.phase] += 1
        self._unread.append(step)

    def take(self) -> Mapping[str, float]:
        """Return what is to be logged of the steps since the last call; nothing before the first step."""
        self._read()
        since = {phase: self._steps[phase] - self._logged[phase] for phase in self._steps}
        self._logged = dict(self._steps)
        if not sum(since.values()):
            return {}
        sparse = since[SPARSE] / sum(since.values())
        found = {"sparse_steps": sparse, "flops": 1 - sparse * (1 - self._flops_of_sparse_step())}
        if self._tokens:
            self._context.append(1 - float(self._output) / self._tokens)
            found["context"] = self._context[-1]
            self._tokens, self._output = 0, 0
        for phase, timed in self._timed.items():
            if speeds := [tokens / seconds for seconds, tokens in timed if tokens]:
                found[f"tokens_per_second_{phase}"] = statistics.median(speeds)
        found |= self._left()
        found["graphs"] = len(self._session.reports)
        if self._session.online_maps:
            found["map_error"] = statistics.median(each.error for each in self._session.online_maps.values())
        found["renewals"] = self._session.renewals
        return {f"sparselora/{name}": value for name, value in found.items()}

    def closing_line(self) -> str:
        """Return what a run came to, in a line for people; empty where no step was taken."""
        self._read()
        taken = sum(self._steps.values())
        if not taken:
            return ""
        if not self._steps[SPARSE]:
            return f"none of {taken} steps was sparse. {self._why_none()}"
        line = f"{self._steps[SPARSE]} of {taken} steps were sparse"
        dense, sparse = (self._median(phase) for phase in (DENSE, SPARSE))
        if dense and sparse:
            saved = self._steps[SPARSE] * (dense - sparse)
            line += (
                f": {sparse:.3g} s each, where a dense one takes {dense:.3g} s (medians), so that about "
                f"{max(saved, 0):.0f} s were saved"
            )
            if self._compiling:
                line += f"; steps with compilations took {sum(self._compiling):.0f} s"
        return f"{line}. {self._next(dense, sparse)}".rstrip()

    def _read(self) -> None:
        """Read the clock of the steps that have ended."""
        for step in self._unread:
            seconds = self._clock.between(step.begin, step.end)
            if step.compiled:
                self._compiling.append(seconds)
            elif seconds > 0:
                self._timed[step.phase].append((seconds, step.tokens))
        self._unread.clear()

    def _median(self, phase: Phase) -> float | None:
        return statistics.median(seconds for seconds, _ in self._timed[phase]) if self._timed[phase] else None

    def _flops_of_sparse_step(self) -> float:
        """Return the FLOPs of a sparse step, of those of the model as it is; 1 where no graph is known."""
        before = sum(report.flops_before for report in self._session.reports)
        after = sum(report.flops_after for report in self._session.reports)
        return float(after / before) if before else 1.0

    def _left(self) -> dict[str, float]:
        """Return the minutes that are left, and those that there would be without a sparse step."""
        schedule, dense, sparse = self._session.schedule, self._median(DENSE), self._median(SPARSE)
        if schedule.total_steps is None or dense is None:
            return {}
        left = max(schedule.total_steps - schedule.step, 0)
        found = {"minutes_left_if_dense": left * dense / 60}
        ahead = self._session.sparse_steps_left
        if sparse is not None and ahead is not None:
            found["minutes_left"] = ((left - ahead) * dense + ahead * sparse) / 60
        return found

    def _why_none(self) -> str:
        if self._session.window is None:
            return "The options give the sparse phase as fractions of a run whose length is not known"
        if not any(site.sparse for report in self._session.reports for site in report.sites):
            return "No site is sparse: `sparse_compile.explain(model, **batch)` says why"
        return "The run ended before the sparse phase, or its maps had no tokens to be fitted to"

    def _next(self, dense: float | None, sparse: float | None) -> str:
        """Return the one thing that is most worth trying next; empty where there is none."""
        config = self._session.config
        context = statistics.mean(self._context) if self._context else None
        if context is not None and context < _FEW_CONTEXT:
            return f"Of the tokens {context:.0%} are context, and nothing is saved on the others"
        if dense and sparse and dense < _LITTLE_GAIN * sparse:
            return "Sparse steps are hardly faster: `sparse_compile.explain(model, **batch)` says what stays dense"
        if config is not None and config.preset in ("o1", "o2") and not config.site_option:
            return "To try next: preset 'auto' (docs/recipes.md)"
        if config is not None and config.preset == "auto" and config.dense_from is None:
            return "To try next: end_step=0.85, so that adapters get used to a dense context (docs/recipes.md)"
        return ""
