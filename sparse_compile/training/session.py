"""Keep what is known about one model while it trains, from the first compilation to the last step.

A `Session` links the backend, the schedule, the callback and the reports of one model. None of them is handed to the
other: they meet through the trained parameters, which all of them see. The registry holds those weakly, so that a dead
model leaves nothing behind, and a copy of a model is another model.

How the phase reaches a compiled graph: a dense step is a step in which every token counts as an output token. The
graph reads that from a tensor, `Session.dense_step`, which the session writes in place: one executable serves both
phases, and a change of phase costs nothing. Only a graph of fixed sizes is for one phase: Dynamo guards on `PHASES`.

How steps are counted: torch calls a global hook after every `Optimizer.step`. Optimizers that are no
`torch.optim.Optimizer`, or that hold copies of the parameters, are not seen; `SparseLoRACallback` and `Schedule` cover
those. Under FSDP2 graphs see gathered parameters and the optimizer holds sharded ones: there the model ties the two.
"""

from __future__ import annotations

import itertools
import logging
import warnings
import weakref
from collections.abc import Hashable, Iterable, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.options.presets import match_site
from sparse_compile.torch_private.autograd import after_backward, running_backward
from sparse_compile.training import sharded as sharded_models
from sparse_compile.training.schedule import DENSE, STATE_LOCK, Phase, Schedule, phase_at, sparse_window, was_skipped

__all__ = ["FORWARDS_BEFORE_WARNING", "PHASES", "Session", "session_for"]

_LOGGER: Final = logging.getLogger(__name__)

PHASES: Final[dict[int, Phase]] = {}
"""The phase that each living session's next forward computes: `session.id` to `"dense"` or `"sparse"`, for guards.

It changes between a backward and the next forward only, so that the recomputation of a checkpoint computes what its
forward did. Entries go with their models.
"""

FORWARDS_BEFORE_WARNING: Final = 100
"""Training forwards without an optimizer step after which the user is told that no step was seen."""

_IDS: Final = itertools.count()
_OWNERS: Final[dict[int, tuple[weakref.ref[Tensor], Session]]] = {}
"""id of a trained parameter to the parameter and its session. A plain dict, because the step hook looks up every
parameter of every optimizer; an id is not reused before the reference's callback has removed it here."""

_hook_registered = False


def session_for(
    trained: Sequence[Tensor], config: SparseLoRAConfig | None = None, sharded: nn.Module | None = None
) -> Session:
    """Return the session of the model that these parameters belong to, made on first use.

    It is the session that has any of them; parameters that it did not have become its own. Where they bridge several
    sessions (a model that arrived in several graphs), these become one: the oldest goes on, the others stay valid as
    other names of it.

    Args:
        trained: parameters that the model trains.
        config: what the user chose; None leaves a session's configuration as it is (the callback, which may come before
            the first compilation, knows none). A configuration replaces an older one.
        sharded: the model, where FSDP2 manages it. Its graphs and the callback see no parameter in common: the model is
            what makes their session one.

    Raises:
        ValueError: `trained` is empty.
    """
    if not trained:
        raise ValueError("a session belongs to the trained parameters of a model, and there are none")
    _register_hook_once()
    with STATE_LOCK:
        found = {session.id: session for parameter in trained if (session := _owner(parameter)) is not None}
        if sharded is not None:
            known = (session._root() for session in sharded_models.sessions_of(sharded))
            found |= {session.id: session for session in known}
        if found:
            session, *others = (found[key] for key in sorted(found))
            for other in others:
                session._absorb(other)
        else:
            session = Session()
        session._own(trained)
        if sharded is not None:
            sharded_models.remember(sharded, session)
        if config is not None:
            session._configure(config)
        session._refresh()
    return session


class Session:
    """Everything that is known of one model. Made by `session_for`.

    Attributes:
        id: key of this session in `PHASES`. Valid for as long as a parameter of the model lives, merged or not.
    """

    def __init__(self) -> None:
        self.id = next(_IDS)
        self._merged_into: Session | None = None
        self._ids = [self.id]
        self._parameters: set[int] = set()
        self._dense_flags: list[Tensor] = []
        self._config: SparseLoRAConfig | None = None
        self._reports: list[Any] = []
        self._told: set[Hashable] = set()
        # Optimizer steps.
        self._schedule = Schedule()
        self._schedule.subscribe(self._refresh)
        self._known_step = 0
        self._first_graph: Hashable | None = None
        self._forwards = 0
        self._publishing_after: int | None = None
        # Site names.
        self._patterns: tuple[str, ...] = ()
        self._names: dict[str, None] = {}
        self._sites_pending = False

    @property
    def config(self) -> SparseLoRAConfig | None:
        """What the user chose; None while only the callback knows of this model."""
        return self._root()._config

    @property
    def schedule(self) -> Schedule:
        """The position of this model's training run."""
        return self._root()._schedule

    @property
    def phase(self) -> Phase:
        """The phase of the next forward; `"dense"` once the model is gone."""
        return PHASES.get(self.id, DENSE)

    def dense_step(self, device: torch.device) -> Tensor:
        """Return what tells a compiled graph the phase: bool, without dimensions, true while it is dense.

        One tensor for each device. Graphs take it as an input and read it in their forwards.
        """
        with STATE_LOCK:
            flags = self._root()._dense_flags
            for flag in flags:
                if flag.device == device:
                    return flag
            with torch.inference_mode(mode=False):
                flags.append(torch.tensor(self.phase == DENSE, device=device))
            return flags[-1]

    @property
    def reports(self) -> list[Any]:
        """One report for each compiled graph, in the order of compilation; the backend appends.

        A report holds plain data: one that holds a parameter keeps the model alive.
        """
        return self._root()._reports

    def once(self, key: Hashable) -> bool:
        """Return True the first time that this model asks for `key`: for warnings that are given once."""
        with STATE_LOCK:
            told = self._root()._told
            is_first = key not in told
            told.add(key)
            return is_first

    def set_position(self, step: int, total_steps: int | None) -> None:
        """Set where the run stands, overriding what was counted; as `Schedule.set_position`."""
        self.schedule.set_position(step, total_steps)

    def note_training_forward(self, graph_key: Hashable) -> None:
        """Note that a compiled training graph of this model runs. The backend calls it at each run, in either phase.

        A model in several graphs is counted by the one that ran first since the last optimizer step. A run inside a
        backward is a checkpoint's recomputation, no forward.

        Args:
            graph_key: names the code that was compiled, equal for all its compilations (Dynamo's frame id, say): a
                sequence of another length must not look like another graph. Plain data, for it is kept.

        Raises:
            ValueError: the configuration is strict and names a site that is nowhere (see `expect_sites`).
        """
        if running_backward() is not None:
            return
        with STATE_LOCK:
            root = self._root()
            root._schedule.note_forward()
            if root._forwards == 0:
                root._first_graph = graph_key
            if graph_key != root._first_graph:
                return
            root._forwards += 1
            root._tell_about_start()
            root._tell_about_missing_steps()
            if root._forwards == 2 and root._sites_pending:
                # No optimizer has shown yet which graphs are one model. Those that expect the same sites may be.
                alive = {session.id: session for _, owner in list(_OWNERS.values()) for session in (owner._root(),)}
                _check_sites([session for session in alive.values() if session._patterns == root._patterns])

    def expect_sites(self, patterns: Iterable[str]) -> None:
        """Have the site names of the configuration checked once all graphs of a training step are known.

        That is at the first counted optimizer step, or before it at the second forward of the first graph. Names that
        match no site (of any session whose parameters the same optimizer holds) give one warning; strict raises.

        Args:
            patterns: the keys of `layer_sparsity`; they replace those that were given before.
        """
        patterns = tuple(dict.fromkeys(patterns))
        with STATE_LOCK:
            root = self._root()
            if patterns != root._patterns:
                root._patterns = patterns
                root._sites_pending = bool(patterns)

    def add_site_names(self, names: Iterable[str]) -> None:
        """Add the sites of one more graph of this model."""
        with STATE_LOCK:
            self._root()._names.update(dict.fromkeys(names))

    def check_sites_now(self) -> None:
        """Check the expected site names at once: for a graph that is known to be the whole model.

        Raises:
            ValueError: the configuration is strict and names a site that is nowhere.
        """
        with STATE_LOCK:
            _check_sites([self._root()])

    def __repr__(self) -> str:
        return f"Session(id={self.id}, parameters={len(self._root()._parameters)}, schedule={self.schedule!r})"

    def _root(self) -> Session:
        """Return the session that this one was merged into, or itself."""
        session = self
        while session._merged_into is not None:
            session = session._merged_into
        return session

    def _own(self, trained: Iterable[Tensor]) -> None:
        """Register parameters, held weakly, as this session's."""
        for parameter in trained:
            key = id(parameter)
            if key not in self._parameters:
                self._parameters.add(key)
                _OWNERS[key] = (weakref.ref(parameter, partial(_forget, key)), self)

    def _absorb(self, other: Session) -> None:
        """Take over everything of another session of the same model."""
        for key in other._parameters:
            _OWNERS[key] = (_OWNERS[key][0], self)
        self._parameters |= other._parameters
        self._ids += other._ids
        self._dense_flags += other._dense_flags
        self._reports += other._reports
        self._told |= other._told
        self._names.update(other._names)
        self._patterns = tuple(dict.fromkeys(self._patterns + other._patterns))
        self._sites_pending |= other._sites_pending
        self._config = self._config or other._config
        other._schedule.unsubscribe(other._refresh)
        if other._schedule.position_given and not self._schedule.position_given:
            self._follow(other._schedule)
        other._merged_into = self

    def _configure(self, config: SparseLoRAConfig) -> None:
        """Take a configuration, and its schedule if it has one."""
        self._config = config
        if config.schedule is not None and config.schedule is not self._schedule:
            known = self._schedule
            self._follow(config.schedule)
            if known.position_given:
                # The trainer's callback was here first, and it overrides.
                total_steps = config.schedule.total_steps if known.total_steps is None else known.total_steps
                config.schedule.set_position(known.step, total_steps)

    def _follow(self, schedule: Schedule) -> None:
        """Listen to another schedule."""
        self._schedule.unsubscribe(self._refresh)
        self._schedule = schedule
        schedule.subscribe(self._refresh)

    def _refresh(self) -> None:
        """Bring the phase up to date after a change of position or configuration, between backward and forward."""
        with STATE_LOCK:
            if self._schedule.step != self._known_step:
                self._known_step = self._schedule.step
                self._forwards = 0
            backward = running_backward()
            if backward is None or any(key not in PHASES for key in self._ids):
                self._publish()
            elif self._publishing_after != backward:
                # An optimizer that steps inside the backward. A backward that fails runs no callbacks, so remember
                # which one was asked, not merely that one was.
                self._publishing_after = backward
                after_backward(self._publish)

    def _publish(self) -> None:
        """Write the phase to where graphs read it."""
        with STATE_LOCK:
            if self._parameters and self._merged_into is None:
                phase = phase_at(self._schedule.step, self._schedule.total_steps, *self._start_and_end())
                PHASES.update(dict.fromkeys(self._ids, phase))
                for flag in self._dense_flags:
                    flag.fill_(phase == DENSE)

    def _start_and_end(self) -> tuple[float | None, float | None]:
        return (None, None) if self._config is None else (self._config.start_step, self._config.end_step)

    def _tell_about_start(self) -> None:
        """Say once what an unknown length of the run means for the start."""
        if self._schedule.total_steps is not None:
            return
        start, end = self._start_and_end()
        if sparse_window(None, start, end) is None:
            if self.once("a fraction without a total"):
                warnings.warn(
                    f"start_step={start}, end_step={end} holds a fraction of the run, and the length of the run is not "
                    "known: training stays dense. Add SparseLoRACallback() to the Trainer's callbacks, or pass the "
                    "option schedule=Schedule(total_steps=...), or give numbers of steps (an int).",
                    stacklevel=3,
                )
        elif start is None and self.once("start without a total"):
            _LOGGER.info("the length of the run is not known, so sparse training starts at step 0 (start_step)")

    def _tell_about_missing_steps(self) -> None:
        """Say once that the schedule does not move."""
        if self._forwards < FORWARDS_BEFORE_WARNING or self._schedule.position_given:
            return
        if self.once("no optimizer step seen"):
            warnings.warn(
                f"{FORWARDS_BEFORE_WARNING} training forwards ran and no optimizer step was seen: the schedule stands "
                f"at step {self._schedule.step} ({self.phase}). Steps are seen of a torch.optim.Optimizer that holds "
                "the trained parameters themselves. For any other, add SparseLoRACallback() to the Trainer's callbacks "
                "or set the step of a Schedule after each step (option schedule). Ignore this if you accumulate "
                "gradients over that many forwards.",
                stacklevel=3,
            )


def _check_sites(sessions: Sequence[Session]) -> None:
    """Compare the names that these sessions, one model, expect with the sites that they have."""
    pending = [session for session in sessions if session._sites_pending]
    names = list(dict.fromkeys(name for session in sessions for name in session._names))
    unmatched: dict[str, None] = {}
    for session in pending:
        session._sites_pending = False
        for pattern in session._patterns:
            # A session that joins later brings the same expectations again: told is told.
            told_by_another = any(("no such site", pattern) in other._told for other in sessions)
            if not told_by_another and not any(match_site(pattern, name) for name in names):
                unmatched[pattern] = None
    for session in sessions:
        session._told.update(("no such site", pattern) for pattern in unmatched)
    if not unmatched:
        return
    there = ", ".join(names) if names else "none"
    message = f"layer_sparsity: no site of this model matches {', '.join(unmatched)}. Sites there are: {there}"
    if any(session._config is not None and session._config.strict for session in pending):
        raise ValueError(message)
    warnings.warn(message, stacklevel=3)


def _owner(parameter: Tensor) -> Session | None:
    """Return the session that has this parameter."""
    entry = _OWNERS.get(id(parameter))
    return entry[1] if entry is not None and entry[0]() is parameter else None


def _forget(key: int, reference: weakref.ref[Tensor]) -> None:
    """Drop a dead parameter, and with the last one of a session its entries in `PHASES`."""
    with STATE_LOCK:
        entry = _OWNERS.get(key)
        if entry is None or entry[0] is not reference:
            return
        del _OWNERS[key]
        session = entry[1]
        session._parameters.discard(key)
        if not session._parameters:
            for session_id in session._ids:
                PHASES.pop(session_id, None)


def _register_hook_once() -> None:
    """Have torch report every optimizer step from now on. Nothing is hooked before the first session is made."""
    global _hook_registered
    with STATE_LOCK:
        if not _hook_registered:
            _hook_registered = True
            register_optimizer_step_post_hook(_after_optimizer_step)


# Dynamo traces step hooks along with a compiled optimizer step: keep it out of this bookkeeping.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _after_optimizer_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Count the step for every session whose parameters the optimizer holds; the first one also checks site names."""
    with STATE_LOCK:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        strangers = {id(parameter) for parameter in parameters if _owner(parameter) is None}
        for of_model, shard in sharded_models.shards(strangers):
            of_model._root()._own([shard])
        found = {session.id: session for parameter in parameters if (session := _owner(parameter)) is not None}
        if not found or was_skipped(optimizer):
            return
        sessions = list(found.values())
        # Sessions may share a schedule, which counts a step once.
        schedules = {id(session._schedule): session._schedule for session in sessions}
        counted = [schedule.note_step() for schedule in schedules.values()]
        if any(counted):
            _check_sites(sessions)
