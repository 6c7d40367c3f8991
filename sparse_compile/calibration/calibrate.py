"""Fit maps to a model's feed-forward blocks, and choose which of them to use under a budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm.auto import tqdm

from sparse_compile.calibration.losses import held_out_loss
from sparse_compile.calibration.taps import TappedModel
from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.options.recipe import AffineMap, Recipe, SiteRecipe
from sparse_compile.surrogates.fit import FittedMap, fit_maps
from sparse_compile.surrogates.moments import Moments, NonFiniteActivation
from sparse_compile.training.news import say

__all__ = ["DEFAULT_LOSS_BUDGET", "RANKS", "Calibration", "SiteCalibration", "calibrate"]

RANKS = (8, 16, 32, 64, 128)
"""Ranks that are tried. A rank is chosen where no higher one has an error that is lower by more than 2%."""

DEFAULT_LOSS_BUDGET = 0.01
"""Rise of the held-out loss, in nats a token, that a recipe may cost unless the user says otherwise."""

_RANK_TOLERANCE = 0.02
_TOKENS_PER_DIMENSION = 4
_HELD_OUT_EVERY = 4
_MEMORY_BYTES = 4 * 2**30


@dataclass(frozen=True)
class SiteCalibration:
    """What was found out about one site.

    Attributes:
        name: site name.
        rank: rank of the map that was chosen for it.
        error: held-out error of that map, relative to the best constant's.
        rise: rise of the held-out loss with this map alone in place, nats a token.
        chosen: whether the recipe has it.
    """

    name: str
    rank: int
    error: float
    rise: float
    chosen: bool


@dataclass(frozen=True)
class Calibration:
    """A recipe, and what it was chosen from.

    Attributes:
        recipe: The recipe; of no site where nothing meets the budget.
        loss: Held-out loss of the model as it is, nats a token.
        rise: How much higher it is with the whole recipe in place, measured.
        sites: Every site that could be measured, the cheapest in loss first.
        curve: Pairs of a number of sites, in that order, and the rise of the loss with all of them in place.
        declined: By site name, why a site could not be measured.
        tokens: Number of context tokens that maps were fitted on.
    """

    recipe: Recipe
    loss: float
    rise: float
    sites: tuple[SiteCalibration, ...]
    curve: tuple[tuple[int, float], ...]
    declined: Mapping[str, str] = field(default_factory=dict)
    tokens: int = 0

    def __str__(self) -> str:
        chosen = sum(site.chosen for site in self.sites)
        summary = (
            f"{chosen} of {len(self.sites)} feed-forward blocks get a map for context tokens: held-out loss "
            f"{self.loss:.4f} -> {self.loss + self.rise:.4f} ({self.rise:+.4f}), fitted on {self.tokens} tokens"
        )
        lines = [
            summary,
            "",
            tabulate(
                [(s.name, s.rank, f"{s.error:.3f}", f"{s.rise:+.4f}", "yes" if s.chosen else "no") for s in self.sites],
                ("site", "rank", "error", "loss alone", "chosen"),
                tablefmt="plain",
                disable_numparse=True,
            ),
            *(f"{name}: {reason}" for name, reason in self.declined.items()),
        ]
        return "\n".join(lines)


def calibrate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    loss_budget: float = DEFAULT_LOSS_BUDGET,
    ranks: Sequence[int] = RANKS,
    config: SparseLoRAConfig | Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Calibration:
    """Fit a map to each feed-forward block of a model, and choose those that stay within a budget of loss.

    Runs forwards alone, without gradients: the model is left as it is. Every fourth batch is held out: it chooses ridge
    and rank of each map, and measures losses. Sites are ordered by what each alone costs in held-out loss for the FLOPs
    that it saves; the recipe is the longest start of that order whose loss, measured with all of its maps in place,
    stays within the budget.

    Args:
        model: The model, compiled or not, with its adapters. It computes its own loss from `labels`.
        batches: What training steps pass to it, at least 2. They are kept in memory until all is measured.
        loss_budget: Rise of the held-out loss that the recipe may cost, nats a token, at least 0.
        ranks: Ranks to try, each at least 1.
        config: The options that the model is to be trained with; `ignore_index` alone matters here.
        progress: Whether to show a progress bar.

    Returns:
        The recipe, with what it was chosen from.

    Raises:
        ValueError: A wrong argument, fewer than 2 batches, a model that returns no finite loss or has no feed-forward
            block of frozen layers, or no context token.
    """
    if not loss_budget >= 0:  # NaN fails this comparison too
        raise ValueError(f"loss_budget is a rise of the loss of at least 0, got {loss_budget!r}")
    if not ranks or any(isinstance(rank, bool) or not isinstance(rank, int) or rank < 1 for rank in ranks):
        raise ValueError(f"ranks must be integers of at least 1, got {ranks!r}")
    kept = list(batches)
    if len(kept) < 2:
        raise ValueError(f"calibration needs at least 2 batches, one of them held out, and got {len(kept)}")
    options = config if isinstance(config, SparseLoRAConfig) else SparseLoRAConfig.from_options(config)
    run = _Run(TappedModel(model, options), kept, sorted(set(ranks)), progress=progress)
    return run.choose(loss_budget)


class _Run:
    """One calibration: statistics, maps, losses."""

    def __init__(
        self, tapped: TappedModel, batches: Sequence[Mapping[str, Any]], ranks: Sequence[int], *, progress: bool
    ) -> None:
        self.tapped = tapped
        self.ranks = ranks
        self.bar = tqdm(desc="calibrate", unit=" forwards", disable=not progress)
        self.held_out = [batch for place, batch in enumerate(batches) if place % _HELD_OUT_EVERY == 1]
        self.train = [batch for place, batch in enumerate(batches) if place % _HELD_OUT_EVERY != 1]
        self.tokens = 0

    def choose(self, budget: float) -> Calibration:
        """Return the calibration."""
        with self.bar:
            loss = self.loss({})  # the first forward finds the sites
            if not self.tapped.taps and not self.tapped.declined:
                raise ValueError("this model has no feed-forward block of frozen layers: there is nothing to fit")
            fitted = self.fit()
            maps = {name: each.map for name, each in fitted.items()}
            rises = {name: self.rise({name: maps[name]}, loss) for name in maps}
            order = sorted(maps, key=lambda name: rises[name] / self.tapped.taps[name].flops)
            curve = self.search(order, maps, loss, budget)
        count = max(curve, key=lambda each: each if curve[each] <= budget else -1)
        chosen = order[:count]
        sites = [
            SiteCalibration(name, maps[name].rank, fitted[name].error, rises[name], name in chosen) for name in order
        ]
        recipe = Recipe(
            {
                name: SiteRecipe(maps[name], weights=self.tapped.taps[name].weights, error=fitted[name].error)
                for name in self.tapped.taps
                if name in chosen
            },
            {"tokens": self.tokens, "loss": loss, "rise": curve[count], "loss_budget": budget, **_versions()},
        )
        points = tuple(sorted(curve.items()))
        return Calibration(recipe, loss, curve[count], tuple(sites), points, self.tapped.declined, self.tokens)

    def search(
        self, order: Sequence[str], maps: Mapping[str, AffineMap], loss: float, budget: float
    ) -> dict[int, float]:
        """Find the longest start of the order within the budget by bisection; return the rises that were measured."""
        curve = {0: 0.0}
        low, high = 0, len(order)
        while low < high:
            # The whole first: where all fits, nothing else need be measured.
            middle = high if high == len(order) and high not in curve else (low + high + 1) // 2
            curve[middle] = self.rise({name: maps[name] for name in order[:middle]}, loss)
            low, high = (middle, high) if curve[middle] <= budget else (low, middle - 1)
        return curve

    def fit(self) -> dict[str, FittedMap]:
        """Fit a map to each site."""
        found: dict[str, FittedMap] = {}
        for group in self.groups():
            moments = [self.moments(group, batches) for batches in (self.train, self.held_out)]
            for name in group:
                if name in self.tapped.declined:
                    continue
                if any(name not in each for each in moments):
                    part = "to fit on" if name not in moments[0] else "held out"
                    self.tapped.declined[name] = f"no batch {part} runs through it, or none of them has labels"
                    continue
                train, held_out = (each[name] for each in moments)
                if not train.count or not held_out.count:
                    raise ValueError("the batches have no context token: every token carries a label or predicts one")
                self.tokens = round(train.count)
                found[name] = _cheapest(fit_maps(train, held_out, self.ranks))
                self.check_count(name, train)
        return found

    def groups(self) -> list[list[str]]:
        """Return the sites in groups whose statistics fit into memory at one time."""
        groups: list[list[str]] = [[]]
        used = 0
        for name, tap in self.tapped.taps.items():
            size = 2 * 4 * tap.in_features * (tap.in_features + tap.out_features)
            if groups[-1] and used + size > _MEMORY_BYTES:
                groups.append([])
                used = 0
            groups[-1].append(name)
            used += size
        return groups

    def moments(self, names: Sequence[str], batches: Sequence[Mapping[str, Any]]) -> dict[str, Moments]:
        """Gather the statistics of some sites over some batches."""
        gathered: dict[str, Moments] = {}

        def collector(name: str) -> Any:
            def collect(x: Tensor, y: Tensor) -> None:
                moments = gathered.setdefault(name, Moments.empty(x.shape[1], y.shape[1], x))
                try:
                    moments.add(x, y)
                except NonFiniteActivation as error:
                    self.tapped.declined[name] = str(error)

            return collect

        self.tapped.put({})
        self.tapped.collect({name: collector(name) for name in names if name not in self.tapped.declined})
        try:
            for batch in batches:
                self.tapped(batch)
                self.bar.update()
        finally:
            self.tapped.collect({})  # compiled code keeps the taps, and they would keep the statistics
        return gathered

    def check_count(self, name: str, train: Moments) -> None:
        """Say that there were few tokens."""
        wanted = _TOKENS_PER_DIMENSION * len(train.mean_x)
        if train.count < wanted and name == next(iter(self.tapped.taps)):
            say(
                f"maps are fitted on {train.count} context tokens, {train.count / len(train.mean_x):.1f} "
                f"for each of {len(train.mean_x)} input features. They would be better with {wanted} or more."
            )

    def rise(self, maps: Mapping[str, AffineMap], loss: float) -> float:
        """Return how much higher the held-out loss is with these maps in place; infinite where it is not finite."""
        try:
            return self.loss(maps) - loss
        except ValueError:
            return math.inf  # without maps it is finite

    def loss(self, maps: Mapping[str, AffineMap]) -> float:
        """Return the held-out loss with these maps in place."""
        self.tapped.put(maps)
        try:
            return held_out_loss(self.tapped, self.held_out, self.bar.update, self.tapped.config.ignore_index)
        finally:
            self.tapped.put({})


def _cheapest(fitted: Mapping[int, FittedMap]) -> FittedMap:
    """Return the map of the lowest rank that is about as good as the best."""
    best = min(each.error for each in fitted.values())
    return next(each for _, each in sorted(fitted.items()) if each.error <= best * (1 + _RANK_TOLERANCE))


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, "sparse_compile": version("sparse-compile")}
