"""Fit maps of several ranks to each site of a model, by the statistics of some batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor

from sparse_compile.calibration.taps import TappedModel
from sparse_compile.options.recipe import AffineMap
from sparse_compile.surrogates.fit import FittedMap, fit_maps
from sparse_compile.surrogates.moments import Moments, NonFiniteActivation
from sparse_compile.training.news import say

__all__ = ["Fits", "fit_sites", "memory_groups"]

_TOKENS_PER_DIMENSION: Final = 4
_MEMORY_BYTES: Final = 4 * 2**30

Batches = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Fits:
    """Maps that were fitted.

    Attributes:
        maps: By site name, in the order of the model, and by rank.
        tokens: Number of context tokens that they were fitted on.
    """

    maps: Mapping[str, Mapping[int, FittedMap]]
    tokens: int

    def affine(self) -> dict[str, dict[int, AffineMap]]:
        """Return the maps alone."""
        return {name: {rank: each.map for rank, each in found.items()} for name, found in self.maps.items()}


def memory_groups(tapped: TappedModel) -> list[list[str]]:
    """Return the sites in groups whose statistics fit into memory at one time."""
    groups: list[list[str]] = [[]]
    used = 0
    for name, tap in tapped.taps.items():
        size = 2 * 4 * tap.in_features * (tap.in_features + tap.out_features)
        if groups[-1] and used + size > _MEMORY_BYTES:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    return groups


def fit_sites(
    tapped: TappedModel, train: Batches, held_out: Batches, ranks: Sequence[int], done: Callable[[], object]
) -> Fits:
    """Fit maps to each site; what has none is added to `tapped.declined` with the reason.

    Args:
        tapped: The model, which has run once.
        train: The batches to fit on.
        held_out: Those that choose the ridge and give the error.
        ranks: The ranks; one above the number of context tokens is left out.
        done: Called after each forward.

    Raises:
        ValueError: There is no context token, or none that was held out.
    """
    found: dict[str, Mapping[int, FittedMap]] = {}
    tokens = 0
    for group in memory_groups(tapped):
        moments = [_moments(tapped, group, batches, done) for batches in (train, held_out)]
        for name in (each for each in group if each not in tapped.declined):
            if any(name not in each for each in moments):
                part = "to fit on" if name not in moments[0] else "held out"
                tapped.declined[name] = f"no batch {part} runs through it, or none of them has labels"
                continue
            fitted_on, checked_with = (each[name] for each in moments)
            if not fitted_on.count or not checked_with.count:
                part = "" if not fitted_on.count else "held-out "
                raise ValueError(
                    f"the {part}batches have no context token: every token carries a label, predicts one or is padding"
                )
            count = round(fitted_on.count)
            if not tokens:
                _tell_of_few(count, len(fitted_on.mean_x), ranks)
            tokens = count
            usable = [rank for rank in ranks if rank <= count]
            if usable:
                found[name] = _distinct(fit_maps(fitted_on, checked_with, usable))
            else:
                tapped.declined[name] = f"{count} context tokens are fewer than the lowest rank, {min(ranks)}"
    order = [name for name in tapped.taps if name in found]
    return Fits({name: found[name] for name in order}, tokens)


def _distinct(fitted: Mapping[int, FittedMap]) -> Mapping[int, FittedMap]:
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


def _moments(
    tapped: TappedModel, names: Sequence[str], batches: Batches, done: Callable[[], object]
) -> dict[str, Moments]:
    """Gather the statistics of some sites over some batches."""
    gathered: dict[str, Moments] = {}

    def collector(name: str) -> Any:
        def collect(x: Tensor, y: Tensor) -> None:
            moments = gathered.setdefault(name, Moments.empty(x.shape[1], y.shape[1], x))
            try:
                moments.add(x, y)
            except NonFiniteActivation as error:
                tapped.declined[name] = str(error)

        return collect

    tapped.put({})
    tapped.collect({name: collector(name) for name in names if name not in tapped.declined})
    try:
        for batch in batches:
            tapped(batch)
            done()
    finally:
        tapped.collect({})  # compiled code keeps the taps, and they would keep the statistics
    return gathered
