"""Fit maps to feed-forward blocks and to exits of context, and choose of them for a goal of loss, speed or FLOPs."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final
from weakref import WeakSet

from torch import Tensor, nn
from tqdm.auto import tqdm

from sparse_compile.calibration.choice import Choice, choose
from sparse_compile.calibration.costs import StepCost, cost_in_flops, cost_in_seconds, samples_of
from sparse_compile.calibration.exit_check import why_context_stays
from sparse_compile.calibration.fits import Fits, fit_sites, passes_of
from sparse_compile.calibration.goals import Goal, goal_of
from sparse_compile.calibration.held_out import HeldOut
from sparse_compile.calibration.levels import EXIT, Level, exit_levels, worthwhile
from sparse_compile.calibration.origin import data_digest, versions
from sparse_compile.calibration.result import Calibration
from sparse_compile.calibration.tables import curve_of, exits_of, sites_of
from sparse_compile.calibration.taps import TappedModel
from sparse_compile.calibration.timing import STEP_FORWARDS, Untimed
from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.options.presets import AUTO_DENSE_EVERY
from sparse_compile.options.recipe import Recipe, SiteRecipe
from sparse_compile.torch_private.modules import original_module
from sparse_compile.training.news import say

__all__ = ["MAX_FORWARDS", "RANKS", "Calibration", "calibrate"]

RANKS: Final = (0, 8, 16, 32, 64, 128)
"""Ranks that are tried for each block; 0 is a constant."""

MAX_FORWARDS: Final = 80
"""Forwards of a batch that a calibration may cost. With frozen weights a training step computes as much as two, so this
is 4% of a run of 1,000 steps; fits and timing take the rest of 5%."""

_LEAST_FORWARDS: Final = 32
_HELD_OUT_EVERY: Final = 4

Batch = Mapping[str, Any]


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    loss_budget: float | None = None,
    speedup: float | None = None,
    flops: float | None = None,
    ranks: Sequence[int] = RANKS,
    config: SparseLoRAConfig | Mapping[str, Any] | None = None,
    max_forwards: int = MAX_FORWARDS,
    progress: bool = True,
) -> Calibration:
    """Fit maps to each feed-forward block of a model and to exits of context, and choose of them for one goal.

    The model is left as it is: its weights, gradients, modes and random generators too. It runs forwards without
    gradients, and four training steps whose gradients are thrown away, for their time. Every fourth batch is held out:
    it chooses the ridge of each map, and measures losses, always with all maps of a recipe in place.

    Args:
        model: The model, compiled or not, with its adapters. It computes its own loss from `labels`.
        batches: What training steps pass to it, at least 2. They are kept in memory until all is measured.
        loss_budget: Rise of the held-out loss that the recipe may cost, nats a token, at least 0. The recipe is the
            cheapest that stays within it. This is the goal, of 0.01, where none is given.
        speedup: How many times as fast as the step of the model as it is, run eagerly, a step is to be expected, above
            1. The recipe is the one of least held-out loss among those that reach it.
        flops: FLOPs of a step's matrix products that may be left, as a share of the dense step's, between 0 and 1. The
            recipe is the one of least held-out loss among those that do not exceed it.
        ranks: Ranks to try, each at least 0.
        config: The options that the model is to be trained with. `ignore_index` matters here, and all by which context
            stays in a training: with `context_exit=1` no exit is tried.
        max_forwards: How many forwards of a batch the calibration may cost, at least 32; a training step counts as two.
            A third of them is for the fits. With few forwards, losses are searched by with fewer of the held-out
            batches, and more blocks are taken at once; with very few, fewer batches are used, and a line says so.
        progress: Whether to show a progress bar.

    Returns:
        The recipe, with what it was chosen from. It has its maps fitted anew as preset `"auto"` does, by a dense step
        now and then (`dense_every`). It is empty where the goal is out of reach: then `reason` says how far
        one can get, and so does a line.

    Raises:
        ValueError: A wrong argument, two goals, fewer than 2 batches with a label that counts, a model that returns no
            finite loss, has no feed-forward block of frozen layers or is being calibrated already, no context token, or
            a speedup where no step can be timed.
    """
    goal = goal_of(loss_budget, speedup, flops)
    if not ranks or any(isinstance(rank, bool) or not isinstance(rank, int) or rank < 0 for rank in ranks):
        raise ValueError(f"ranks must be integers of at least 0, got {ranks!r}")
    if isinstance(max_forwards, bool) or not isinstance(max_forwards, int) or max_forwards < _LEAST_FORWARDS:
        raise ValueError(f"max_forwards must be an integer of at least {_LEAST_FORWARDS}, got {max_forwards!r}")
    options = config if isinstance(config, SparseLoRAConfig) else SparseLoRAConfig.from_options(config)
    kept = _labelled(list(batches), options.ignore_index)
    with _alone(original_module(model)):
        run = _Run(TappedModel(model, options), goal, sorted(set(ranks)), max_forwards, progress=progress)
        with run.bar:
            return run.calibrate(kept)


class _Run:
    """One calibration.

    Attributes:
        forwards: How many were made so far.
    """

    def __init__(
        self, tapped: TappedModel, goal: Goal, ranks: Sequence[int], max_forwards: int, *, progress: bool
    ) -> None:
        self.tapped = tapped
        self.goal = goal
        self.ranks = ranks
        self.max_forwards = max_forwards
        self.bar = tqdm(desc="calibrate", unit=" forwards", total=max_forwards, disable=not progress)
        self.forwards = 0

    def calibrate(self, batches: Sequence[Batch]) -> Calibration:
        """Return the calibration."""
        typical = sorted(batches, key=_size)[len(batches) // 2]
        samples_of(self.tapped, typical)  # finds the sites
        self.spend()
        if self.tapped.exits and (reason := why_context_stays(self.tapped, typical)):
            self.tapped.keep_context(reason)
        if not self.tapped.taps and not self.tapped.declined:
            raise ValueError("this model has no feed-forward block of frozen layers: there is nothing to fit")
        passes = passes_of(self.tapped)
        batches = self.affordable(batches, len(passes))
        held_out = HeldOut(self.tapped, batches[1::_HELD_OUT_EVERY], self.spend)
        train = [batch for place, batch in enumerate(batches) if place % _HELD_OUT_EVERY != 1]
        fits = fit_sites(self.tapped, passes, train, held_out.batches, self.ranks, self.spend)
        cost = self.cost(typical, fits)
        levels = {
            name: [Level(rank, each.error, cost.saved[name][rank]) for rank, each in found.items()]
            for name, found in fits.maps.items()
        }
        hulls = {name: worthwhile(each) for name, each in levels.items()}
        for name in (name for name, hull in hulls.items() if not hull):
            self.tapped.declined[name] = "no map of it is cheaper than the block"
        exits = self.exits(fits, cost)
        found = choose(self.goal, {**hulls, EXIT: exits}, fits, held_out, self.max_forwards - self.forwards)
        if found.reason:
            say(f"the recipe is empty, for goal {self.goal} is not met: {found.reason}")
        sites = {name: hull for name, hull in hulls.items() if hull}
        return self.result(found, {**sites, EXIT: exits}, fits, cost, held_out.loss, data_digest(batches))

    def spend(self, forwards: int = 1) -> None:
        """Count forwards that were made."""
        self.forwards += forwards
        self.bar.update(forwards)

    def exits(self, fits: Fits, cost: StepCost) -> tuple[Level, ...]:
        """Return the levels of the exit; where there is none, tell why."""
        if self.tapped.stays and self.tapped.config.context_exit != 1:  # else nobody asked for it
            self.tapped.declined[EXIT] = self.tapped.stays
            say(f"context is not to leave in this model: {self.tapped.stays}")
        by_block = []
        for name in fits.exits:
            each = self.tapped.exits[name]
            errors = fits.exit_errors(name, self.ranks if each.later else (0,))
            by_block.append([
                Level(rank, error, cost.exits[name][rank], len(each.later), name, each.covered)
                for rank, error in errors.items()
            ])  # fmt: skip
        return exit_levels(by_block)

    def affordable(self, batches: Sequence[Batch], passes: int) -> Sequence[Batch]:
        """Return as many batches as a third of the forwards can fit maps on."""
        most = self.max_forwards // (3 * passes)
        if most < 2:
            raise ValueError(f"max_forwards={self.max_forwards} is too few: the fits alone take {6 * passes} or more")
        if most < len(batches):
            say(f"{most} of {len(batches)} batches are used: more take max_forwards={3 * passes * len(batches)}")
        return batches[:most]

    def cost(self, batch: Batch, fits: Fits) -> StepCost:
        """Return what a step costs: seconds, or FLOPs where they are the goal or nothing can be timed."""
        samples = samples_of(self.tapped, batch)
        self.spend()
        exit_ranks = sorted({0, *self.ranks})  # an exit without maps has rank 0
        if self.goal.name != "flops":
            try:
                found = cost_in_seconds(self.tapped, batch, samples, fits.affine(), exit_ranks)
                self.spend(STEP_FORWARDS)
                return found
            except Untimed as error:
                if self.goal.name == "speedup":
                    raise ValueError(
                        f"the step of this model cannot be timed: {error}. Give flops=... instead"
                    ) from error
                say(f"costs are counted in FLOPs, for the step cannot be timed: {error}")
        ranks = {name: list(each) for name, each in fits.maps.items()}
        return cost_in_flops(self.tapped, batch, samples, ranks, exit_ranks)

    def result(
        self, found: Choice, hulls: Mapping[str, Sequence[Level]], fits: Fits, cost: StepCost, loss: float, digest: str
    ) -> Calibration:
        """Put together what was found out."""
        dense = cost.dense if cost.unit == "seconds" else 1.0
        expected = dense * max(found.point.cost, 1e-6)
        costs = {"step_seconds": dense, "expected_step_seconds": expected}
        origin = {
            "goal": self.goal.name,
            self.goal.name: self.goal.value,
            "loss": loss,
            "rise": found.rise,
            "expected_loss": loss + found.rise,
            **(costs if cost.unit == "seconds" else {"expected_flops": expected}),
            "tokens": fits.tokens,
            "forwards": self.forwards,
            "data": digest,
            **versions(),
        }
        chosen = {name: found.point.levels[name] for name in fits.maps if name in found.point.levels}
        sites = {
            name: SiteRecipe(fits.maps[name][level.rank].map, weights=self.tapped.taps[name].weights, error=level.error)
            for name, level in chosen.items()
        }
        leaves = found.point.levels.get(EXIT)
        exit_ = None if leaves is None else fits.exit_recipe(leaves, self.tapped.exits[leaves.leaves].weights)
        every = AUTO_DENSE_EVERY if sites or exit_ else None
        return Calibration(
            recipe=Recipe(sites, origin, exit=exit_, dense_every=every),
            goal=self.goal,
            reason=found.reason,
            loss=loss,
            rise=found.rise,
            unit=cost.unit,
            dense_cost=dense,
            expected_cost=expected,
            sites=sites_of(found, hulls),
            curve=curve_of(found, dense),
            exits=exits_of(found, hulls),
            declined=dict(self.tapped.declined),
            tokens=fits.tokens,
            forwards=self.forwards,
        )


def _labelled(batches: Sequence[Batch], ignore_index: int) -> list[Batch]:
    """Return the batches that have a label that the loss counts; of the others it is the mean of nothing.

    Raises:
        ValueError: Fewer than 2 are left.
    """
    kept = [each for each in batches if _has_label(each, ignore_index)]
    left_out = len(batches) - len(kept)
    which = " with a label that the loss counts" if left_out else ""
    if len(kept) < 2:
        raise ValueError(f"calibration needs at least 2 batches{which}, one of them held out, and got {len(kept)}")
    if left_out:
        say(f"{left_out} of {len(batches)} batches have no label that the loss counts, and are left out")
    return kept


def _has_label(batch: Batch, ignore_index: int) -> bool:
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        return True  # what it counts, the model knows alone
    return bool((labels[:, 1:] != ignore_index).any())


def _size(batch: Batch) -> int:
    """Return the number of tokens of a batch, or of elements of its largest tensor."""
    labels = batch.get("labels")
    if isinstance(labels, Tensor):
        return labels.numel()
    return max((each.numel() for each in batch.values() if isinstance(each, Tensor)), default=0)


_CALIBRATED: WeakSet[nn.Module] = WeakSet()
_LOCK = threading.Lock()


@contextmanager
def _alone(model: nn.Module) -> Iterator[None]:
    """Refuse a second calibration of a model: maps of the one would stand in the losses of the other."""
    with _LOCK:
        if model in _CALIBRATED:
            raise ValueError("this model is being calibrated already")
        _CALIBRATED.add(model)
    try:
        yield
    finally:
        with _LOCK:
            _CALIBRATED.discard(model)
