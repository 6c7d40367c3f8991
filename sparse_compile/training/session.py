"""Keep what is known about one model while it trains, from the first compilation to the last step.

A `Session` links the backend, the schedule, the callback and the reports of one model. None of them is handed to the
other: they meet through the trained parameters, which all of them see (`registry.py`). How the phase reaches a compiled
graph is told in `phase.py`.

How steps are counted: torch calls a global hook after every `Optimizer.step`. Optimizers that are no
`torch.optim.Optimizer`, or that hold copies of the parameters, are not seen; `SparseLoRACallback` and `Schedule` cover
those.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.options.schedule_handle import ScheduleHandle
from sparse_compile.predictor.weight_state import WeightWatch
from sparse_compile.surrogates.online import OnlineMap
from sparse_compile.torch_private.autograd import running_backward
from sparse_compile.training.forwards import ForwardCount
from sparse_compile.training.phase import PHASES, PublishedPhase
from sparse_compile.training.registry import Registry
from sparse_compile.training.schedule import (
    DENSE,
    STATE_LOCK,
    Phase,
    Schedule,
    phase_at,
    sparse_positions,
    sparse_window,
)
from sparse_compile.training.schedule_notices import tell_about_missing_steps, tell_about_start
from sparse_compile.training.site_names import SiteNames, check_site_names
from sparse_compile.training.told import Told

__all__ = ["Session", "known_config", "known_sessions", "session_for"]

_IDS: Final = itertools.count()


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
    _REGISTRY.watch_optimizers()
    with STATE_LOCK:
        found = set(_REGISTRY.owners_of(trained))
        if sharded is not None:
            found.update(_REGISTRY.owners_of_model(sharded))
        session, *others = sorted(found, key=lambda each: each.id) or [Session()]
        for other in others:
            session._absorb(other)
        _REGISTRY.give(session, trained)
        if sharded is not None:
            _REGISTRY.remember_model(sharded, session)
        if config is not None:
            session._configure(config)
        session._refresh()
    return session


def known_config(trained: Sequence[Tensor]) -> SparseLoRAConfig | None:
    """Return what the user chose for the model that these parameters belong to; None where no session knows it."""
    sessions = known_sessions(trained)
    return next((session.config for session in sessions if session.config is not None), None)


def known_sessions(trained: Sequence[Tensor]) -> list[Session]:
    """Return the sessions of the model that these parameters belong to, the oldest first; none is made."""
    with STATE_LOCK:
        return sorted(set(_REGISTRY.owners_of(trained)), key=lambda each: each.id)


class Session:
    """Everything that is known of one model. Made by `session_for`.

    Attributes:
        id: key of this session in `PHASES`. Valid for as long as a parameter of the model lives, merged or not.
    """

    def __init__(self) -> None:
        self.id = next(_IDS)
        self._merged_into: Session | None = None
        self._config: SparseLoRAConfig | None = None
        self._reports: list[Any] = []
        self._told = Told()
        self._sites = SiteNames(self._told)
        self._forwards = ForwardCount()
        self._together: list[Session] = []
        self._held: dict[Hashable, None] = {}
        self._online_maps: dict[str, OnlineMap] = {}
        self._map_watches: dict[Hashable, WeightWatch] = {}
        self._between_steps: list[weakref.WeakMethod[Callable[[], None]]] = []
        self._called_at: int | None = None
        self._renewals = 0
        self._published = PublishedPhase(self.id)
        self._schedule: ScheduleHandle = Schedule()
        self._schedule.subscribe(self._refresh)

    @property
    def config(self) -> SparseLoRAConfig | None:
        """What the user chose; None while only the callback knows of this model."""
        return self._root()._config

    @property
    def schedule(self) -> ScheduleHandle:
        """The position of this model's training run."""
        return self._root()._schedule

    @property
    def window(self) -> tuple[int, int | None] | None:
        """The first sparse step and the first dense one after it, as in `sparse_window`."""
        root = self._root()
        return sparse_window(root._schedule.total_steps, *root._start_and_end())

    @property
    def sparse_steps_left(self) -> int | None:
        """How many of the steps to come are sparse, by the schedule; None where the length of the run is not known."""
        root = self._root()
        step, total = root._schedule.step, root._schedule.total_steps
        every = None if root._config is None else root._config.dense_period
        return None if total is None else sparse_positions(step, total, self.window, every)

    @property
    def renewals(self) -> int:
        """How often maps or a predictor's factors were fitted anew in place, as weights or adapters changed."""
        return self._root()._renewals

    def note_renewal(self) -> None:
        """Count one of `renewals`."""
        self._root()._renewals += 1

    @property
    def phase(self) -> Phase:
        """The phase of the next forward; `"dense"` once the model is gone."""
        return PHASES.get(self.id, DENSE)

    def dense_step(self, device: torch.device) -> Tensor:
        """Return what tells a compiled graph the phase: bool, without dimensions, true while it is dense.

        One tensor for each device. Graphs take it as an input and read it in their forwards.
        """
        with STATE_LOCK:
            return self._root()._published.dense_step(device, self.phase)

    @property
    def online_maps(self) -> dict[str, OnlineMap]:
        """The maps that are fitted in this model's run, by the identity of their sites; the backend adds to them."""
        return self._root()._online_maps

    @property
    def map_watches(self) -> dict[Hashable, WeightWatch]:
        """What watches the weights that such maps are fitted for, by sites: one for all graphs that have these."""
        return self._root()._map_watches

    @property
    def due(self) -> bool:
        """Whether the schedule, but for `hold_dense`, has the next step sparse."""
        return self._root()._phase_by_schedule() != DENSE

    def call_between_steps(self, method: Callable[[], None]) -> None:
        """Call a bound method after each change of the position, outside of any backward, while its object lives."""
        with STATE_LOCK:
            root = self._root()
            living = [reference for reference in root._between_steps if reference() is not None]
            root._between_steps = [*living, weakref.WeakMethod(method)]

    def hold_dense(self, key: Hashable) -> None:
        """Have every step be dense, whatever the schedule says, until `release` of the same key.

        Another configuration releases all keys: who held them has gone with the one before.
        """
        with STATE_LOCK:
            self._root()._held[key] = None
            self._root()._refresh()

    def release(self, key: Hashable) -> None:
        """Undo `hold_dense`."""
        with STATE_LOCK:
            self._root()._held.pop(key, None)
            self._root()._refresh()

    def holds(self, key: Hashable) -> bool:
        """Tell whether `hold_dense` of a key is in force."""
        return key in self._root()._held

    @property
    def reports(self) -> list[Any]:
        """One report for each compiled graph, in the order of compilation; the backend appends.

        A report holds plain data: one that holds a parameter keeps the model alive.
        """
        return self._root()._reports

    @property
    def together(self) -> list[Session]:
        """The sessions of one model: those whose parameters the last counted optimizer step changed; none before it."""
        return self._root()._together

    def once(self, key: Hashable) -> bool:
        """Return True the first time that this model asks for `key`: for warnings that are given once."""
        with STATE_LOCK:
            return self._root()._told.once(key)

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
            if not root._forwards.note(graph_key):
                return
            tell_about_start(root._schedule, *root._start_and_end(), root._told)
            tell_about_missing_steps(root._schedule, self.phase, root._forwards.number, root._told)
            if root._forwards.number == 2 and root._sites.pending:
                # No optimizer has shown yet which graphs are one model. Those that expect the same sites may be.
                living = [session._sites for session in _REGISTRY.living()]
                check_site_names([sites for sites in living if sites.patterns == root._sites.patterns])

    def expect_sites(self, patterns: Iterable[str]) -> None:
        """Have the site names of the configuration checked once all graphs of a training step are known.

        That is at the first counted optimizer step, or before it at the second forward of the first graph. Names that
        match no site (of any session whose parameters the same optimizer holds) give one warning; strict raises.

        Args:
            patterns: the keys of `layer_sparsity`; they replace those that were given before.
        """
        with STATE_LOCK:
            self._root()._sites.expect(patterns)

    def add_site_names(self, names: Iterable[str]) -> None:
        """Add the sites of one more graph of this model."""
        with STATE_LOCK:
            self._root()._sites.add(names)

    def check_sites_now(self) -> None:
        """Check the expected site names at once: for a graph that is known to be the whole model.

        Raises:
            ValueError: the configuration is strict and names a site that is nowhere.
        """
        with STATE_LOCK:
            check_site_names([self._root()._sites])

    def __repr__(self) -> str:
        return f"Session(id={self.id}, parameters={_REGISTRY.count(self._root())}, schedule={self.schedule!r})"

    def _root(self) -> Session:
        """Return the session that this one was merged into, or itself."""
        session = self
        while session._merged_into is not None:
            session = session._merged_into
        return session

    def _absorb(self, other: Session) -> None:
        """Take over everything of another session of the same model."""
        _REGISTRY.hand_over(other, self)
        self._published.absorb(other._published)
        self._reports += other._reports
        self._told.absorb(other._told)
        self._sites.absorb(other._sites)
        self._held |= other._held
        self._online_maps |= other._online_maps
        self._map_watches |= other._map_watches
        self._between_steps += other._between_steps
        self._renewals += other._renewals
        if self._config is None and other._config is not None:
            self._take(other._config)
        other._schedule.unsubscribe(other._refresh)
        if other._schedule.position_given and not self._schedule.position_given:
            self._follow(other._schedule)
        other._merged_into = self

    def _take(self, config: SparseLoRAConfig) -> None:
        """Keep a configuration."""
        self._config = config
        self._sites.strict = config.strict

    def _configure(self, config: SparseLoRAConfig) -> None:
        """Take a configuration, and its schedule if it has one."""
        if self._config is not None and config != self._config:
            # What was fitted, or waited for, by the options before: nobody would release it.
            self._held, self._online_maps, self._map_watches = {}, {}, {}
        self._take(config)
        if config.schedule is not None and config.schedule is not self._schedule:
            known = self._schedule
            self._follow(config.schedule)
            if known.position_given:
                # The trainer's callback was here first, and it overrides.
                total_steps = config.schedule.total_steps if known.total_steps is None else known.total_steps
                config.schedule.set_position(known.step, total_steps)

    def _follow(self, schedule: ScheduleHandle) -> None:
        """Listen to another schedule."""
        self._schedule.unsubscribe(self._refresh)
        self._schedule = schedule
        schedule.subscribe(self._refresh)

    def _refresh(self) -> None:
        """Bring the phase up to date after a change of position or configuration, between backward and forward."""
        with STATE_LOCK:
            self._forwards.stand_at(self._schedule.step)
            self._published.between_steps(self._move_on)

    def _move_on(self) -> None:
        """Call what is to be called after a step, and publish the phase of the next."""
        with STATE_LOCK:
            if self._called_at != self._schedule.step:
                self._called_at = self._schedule.step
                for reference in list(self._between_steps):
                    if (method := reference()) is not None:
                        method()
            self._publish()

    def _publish(self) -> None:
        """Write the phase to where graphs read it, while the model lives under this session's name."""
        with STATE_LOCK:
            if _REGISTRY.count(self):
                self._published.write(DENSE if self._held else self._phase_by_schedule())

    def _phase_by_schedule(self) -> Phase:
        every = None if self._config is None else self._config.dense_period
        return phase_at(self._schedule.step, self._schedule.total_steps, *self._start_and_end(), every)

    def _withdraw(self) -> None:
        """Take the phase back: the last parameter of the model is gone."""
        self._published.withdraw()

    def _start_and_end(self) -> tuple[float | None, float | None]:
        return (None, None) if self._config is None else (self._config.start_step, self._config.dense_from)


def _count_step(sessions: list[Session]) -> None:
    """Count an optimizer step for these sessions; the first one also checks site names."""
    # Sessions may share a schedule, which counts a step once.
    schedules = {id(session.schedule): session.schedule for session in sessions}
    counted = [schedule.note_step() for schedule in schedules.values()]
    if any(counted):
        for session in sessions:
            session._together = sessions
        check_site_names([session._sites for session in sessions])


_REGISTRY: Final[Registry[Session]] = Registry(Session._withdraw, _count_step)
