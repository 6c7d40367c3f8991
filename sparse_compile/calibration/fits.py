"""Fit maps of several ranks to each site of a model, and to each exit of context, by the statistics of some batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor

from sparse_compile.calibration.exits import Exit
from sparse_compile.calibration.levels import EXIT, Level
from sparse_compile.calibration.stream import Pair
from sparse_compile.calibration.taps import TappedModel
from sparse_compile.kernels.observed_rows.registry import Observer
from sparse_compile.options.recipe import AffineMap, ExitRecipe, SiteRecipe
from sparse_compile.surrogates.fit import FittedMap, fit_maps
from sparse_compile.surrogates.moments import Moments, NonFiniteActivation
from sparse_compile.training.news import say

__all__ = ["Fits", "Pass", "fit_sites", "passes_of"]

_TOKENS_PER_DIMENSION: Final = 4
_MEMORY_BYTES: Final = 4 * 2**30
"""What statistics of sites may take at one time, and those of exits as much again."""

Batches = Sequence[Mapping[str, Any]]
ByRank = Mapping[int, FittedMap]


@dataclass(frozen=True)
class Pass:
    """Whose statistics are gathered in one run over the batches.

    Attributes:
        sites: Names of feed-forward sites.
        pairs: Of the exits, the block of the exit and a later one.
    """

    sites: Sequence[str]
    pairs: Sequence[Pair]


@dataclass(frozen=True)
class Fits:
    """Maps that were fitted.

    Attributes:
        maps: By site name, in the order of the model, and by rank.
        tokens: Number of context tokens that they were fitted on.
        exits: By name of the block before which context leaves, by that of each later block, and by rank.
    """

    maps: Mapping[str, ByRank]
    tokens: int
    exits: Mapping[str, Mapping[str, ByRank]]

    def affine(self) -> dict[str, dict[int, AffineMap]]:
        """Return the maps of sites alone."""
        return {name: {rank: each.map for rank, each in found.items()} for name, found in self.maps.items()}

    def placed(self, levels: Mapping[str, Level]) -> tuple[dict[str, AffineMap], ExitRecipe | None]:
        """Return the maps of some levels, and the exit among them or None, for `TappedModel.put`."""
        maps = {name: self.maps[name][level.rank].map for name, level in levels.items() if name != EXIT}
        return maps, self.exit_recipe(levels[EXIT]) if EXIT in levels else None

    def exit_recipe(self, level: Level, weights: Mapping[str, Callable[[], str]] | None = None) -> ExitRecipe:
        """Return the exit of a level.

        Args:
            level: The level.
            weights: By later block, what returns the fingerprint of the weights that its map imitates; None for any.
        """
        found = {name: ranks[level.rank] for name, ranks in self.exits[level.leaves].items()}
        return ExitRecipe(
            level.leaves,
            {
                name: SiteRecipe(each.map, weights=weights[name]() if weights else "", error=each.error)
                for name, each in found.items()
            },
        )

    def exit_errors(self, leaves: str, ranks: Iterable[int]) -> dict[int, float]:
        """Return by rank the root of the mean square of the errors of an exit's maps; 0 where there is none."""
        later = self.exits[leaves].values()
        return {
            rank: math.sqrt(sum(each[rank].error ** 2 for each in later) / max(len(later), 1))
            for rank in ranks
            if all(rank in each for each in later)
        }


def passes_of(tapped: TappedModel) -> list[Pass]:
    """Return the runs over the batches that the statistics need; exits for which there is no room are dropped.

    Sites decide how many runs there are. Of the exits as many are kept, evenly spaced, as the memory of these runs has
    room for.
    """
    groups: list[list[str]] = [[]]
    used = 0
    for name, tap in tapped.taps.items():
        size = _bytes(tap.in_features, tap.out_features)
        if groups[-1] and used + size > _MEMORY_BYTES:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    kept = list(tapped.exits.values())
    for stride in range(1, len(tapped.exits) + 1):
        kept = list(tapped.exits.values())[::stride]
        if sum(len(each.later) for each in kept) <= len(groups) * _pairs_at_a_time(tapped):
            break
    tapped.exits = {each.site: each for each in kept}
    pairs = [(each.site, later) for each in kept for later in each.later]
    share = -(-len(pairs) // len(groups))
    return [Pass(group, pairs[place * share : (place + 1) * share]) for place, group in enumerate(groups)]


def _bytes(in_features: int, out_features: int) -> int:
    return 2 * 4 * in_features * (in_features + out_features)


def _pairs_at_a_time(tapped: TappedModel) -> int:
    width = max((part.width for part in tapped.attention.values()), default=1)
    return _MEMORY_BYTES // _bytes(width, width)


def fit_sites(
    tapped: TappedModel,
    passes: Sequence[Pass],
    train: Batches,
    held_out: Batches,
    ranks: Sequence[int],
    done: Callable[[], object],
) -> Fits:
    """Fit maps to each site and exit; what has none is added to `tapped.declined` with the reason.

    Args:
        tapped: The model, which has run once.
        passes: Of `passes_of`.
        train: The batches to fit on.
        held_out: Those that choose the ridge and give the error.
        ranks: The ranks; one above the number of context tokens is left out.
        done: Called after each forward.

    Raises:
        ValueError: There is no context token, or none that was held out.
    """
    found: dict[str, ByRank] = {}
    of_pairs: dict[Pair, ByRank] = {}
    tokens = 0
    for each in passes:
        moments = [_moments(tapped, each, batches, done) for batches in (train, held_out)]
        for name in (name for name in each.sites if name not in tapped.declined):
            if any(name not in gathered for gathered in moments):
                part = "to fit on" if name not in moments[0] else "held out"
                tapped.declined[name] = f"no batch {part} runs through it, or none of them has labels"
                continue
            count = _count(moments[0][name], moments[1][name])
            if not tokens:
                _tell_of_few(count, len(moments[0][name].mean_x), ranks)
            tokens = count
            usable = [rank for rank in ranks if rank <= count]
            if usable:
                found[name] = _distinct(fit_maps(moments[0][name], moments[1][name], usable))
            else:
                tapped.declined[name] = f"{count} context tokens are fewer than the lowest rank, {min(ranks)}"
        for pair in each.pairs:
            if _exit_name(pair[0]) not in tapped.declined and all(pair in gathered for gathered in moments):
                usable = [rank for rank in ranks if rank <= moments[0][pair].count]
                of_pairs[pair] = fit_maps(moments[0][pair], moments[1][pair], usable)
    order = [name for name in tapped.taps if name in found]
    return Fits({name: found[name] for name in order}, tokens, _of_exits(tapped.exits, of_pairs, tapped.declined))


def _of_exits(
    exits: Mapping[str, Exit], fitted: Mapping[Pair, ByRank], declined: Container[str]
) -> dict[str, dict[str, ByRank]]:
    """Return the maps of each exit that has one for every block behind it."""
    return {
        name: {later: fitted[name, later] for later in each.later}
        for name, each in exits.items()
        if _exit_name(name) not in declined and all((name, later) in fitted for later in each.later)
    }


def _exit_name(block: str) -> str:
    """Return the name of an exit among those that are declined."""
    return f"{EXIT} before {block}"


def _count(train: Moments, held_out: Moments) -> int:
    """Return the number of context tokens to fit on.

    Raises:
        ValueError: There is none, or none that was held out.
    """
    if not train.count or not held_out.count:
        part = "" if not train.count else "held-out "
        raise ValueError(
            f"the {part}batches have no context token: every token carries a label, predicts one or is padding"
        )
    return round(train.count)


def _distinct(fitted: ByRank) -> ByRank:
    """Return maps by the rank that they have, which is lower than asked for where no more directions were found."""
    return {each.map.rank: each for each in fitted.values()}


def _tell_of_few(count: int, width: int, ranks: Sequence[int]) -> None:
    wanted = _TOKENS_PER_DIMENSION * width
    if count < wanted:
        left_out = f" No rank above {count} is tried." if max(ranks) > count else ""
        say(
            f"maps are fitted on {count} context tokens, {count / width:.1f} for each of {width} input features. "
            f"They would be better with {wanted} or more.{left_out}"
        )


def _moments(tapped: TappedModel, run: Pass, batches: Batches, done: Callable[[], object]) -> dict[Hashable, Moments]:
    """Gather the statistics of some sites and exits over some batches."""
    gathered: dict[Hashable, Moments] = {}

    def collector(key: Hashable, name: str) -> Observer:
        def collect(x: Tensor, y: Tensor) -> None:
            moments = gathered.setdefault(key, Moments.empty(x.shape[1], y.shape[1], x))
            try:
                moments.add(x, y)
            except NonFiniteActivation as error:
                tapped.declined[name] = str(error)

        return collect

    tapped.put({})
    tapped.collect(
        {name: collector(name, name) for name in run.sites if name not in tapped.declined},
        {pair: collector(pair, _exit_name(pair[0])) for pair in run.pairs},
    )
    try:
        for batch in batches:
            tapped(batch)
            done()
    finally:
        tapped.collect({})  # compiled code keeps the taps, and they would keep the statistics
    return gathered
