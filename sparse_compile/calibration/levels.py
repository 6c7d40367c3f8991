"""The maps that may stand in the place of a block, and those of them that are worth it: error against cost.

What a level loses is taken to grow with the energy that its map misses, the square of its error. Of the levels of a
block only those on the lower convex hull of (saving, energy missed) are tried, from the dense block on: each of the
others saves less for what it loses (Shoham and Gersho 1988, "Efficient bit allocation for an arbitrary set of
quantizers"). Whether the energy tells the loss is left to the search, which measures.

An exit of context has levels as a block has: from one block to the next, each leaves earlier and saves more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

__all__ = ["EXIT", "Level", "exit_levels", "ranks_of", "share_saved", "without_covered", "worthwhile"]

EXIT: Final = "context exit"
"""What stands for the exit among names of sites."""

_LEAST_GAIN = 0.05
"""Share of the most that is saved at a block by which each level must save more than the one before: less is noise."""


@dataclass(frozen=True)
class Level:
    """A map in the place of a block, or an exit of context with a map for each block behind it.

    Attributes:
        rank: Of each map; 0 is a constant.
        error: Held-out error, relative to the best constant's; of several maps the root of the mean square.
        saved: Share of the dense step's cost that it saves.
        maps: Number of maps.
        leaves: Of an exit, the attention block before which context leaves; empty for a map in the place of a block.
        covered: Of an exit, the feed-forward sites behind it: their maps are for nobody, and its saving has theirs.
    """

    rank: int
    error: float
    saved: float
    maps: int = 1
    leaves: str = ""
    covered: frozenset[str] = frozenset()

    @property
    def missed(self) -> float:
        """Energy of what the maps stand for that they miss, over that of its spread, of all maps together."""
        return self.maps * self.error**2


def worthwhile(levels: Iterable[Level]) -> tuple[Level, ...]:
    """Return the levels on the lower convex hull that begins at the dense block, the one that saves least first.

    Empty where none saves anything, or none has a finite error.
    """
    left = [each for each in levels if math.isfinite(each.error) and each.saved > 0]
    least = _LEAST_GAIN * max((each.saved for each in left), default=0.0)
    hull: list[Level] = []
    saved = missed = 0.0
    while left:
        best = min(left, key=lambda each: ((each.missed - missed) / (each.saved - saved), -each.saved))
        hull.append(best)
        saved, missed = best.saved, best.missed
        left = [each for each in left if each.saved >= saved + least]
    return tuple(hull)


def exit_levels(levels: Iterable[Iterable[Level]]) -> tuple[Level, ...]:
    """Return the levels of an exit, the one that saves least first: of each block the best rank.

    Args:
        levels: Of each block before which context may leave, its levels by rank.
    """
    found = [hull[0] for hull in map(worthwhile, levels) if hull]
    chain: list[Level] = []
    for level in sorted(found, key=lambda each: (len(each.covered), each.maps)):
        if not chain or level.saved > chain[-1].saved:
            chain.append(level)
    return tuple(chain)


def without_covered(levels: Mapping[str, Level]) -> dict[str, Level]:
    """Return levels by site without those of sites that context has left before."""
    covered = levels[EXIT].covered if EXIT in levels else frozenset()
    return {name: level for name, level in levels.items() if name not in covered}


def share_saved(levels: Mapping[str, Level]) -> float:
    """Return the share of the dense step's cost that levels by site save together."""
    return sum(level.saved for level in without_covered(levels).values())


def ranks_of(levels: Mapping[str, Level]) -> dict[str, int]:
    """Return the ranks of the maps by feed-forward site, the exit left out."""
    return {name: level.rank for name, level in levels.items() if name != EXIT}
