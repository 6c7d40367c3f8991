"""The maps that may stand in the place of a block, and those of them that are worth it: error against cost.

What a level loses is taken to grow with the energy that its map misses, the square of its error. Of the levels of a
block only those on the lower convex hull of (saving, energy missed) are tried, from the dense block on: each of the
others saves less for what it loses (Shoham and Gersho 1988, "Efficient bit allocation for an arbitrary set of
quantizers"). Whether the energy tells the loss is left to the search, which measures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Level", "worthwhile"]

_LEAST_GAIN = 0.05
"""Share of the most that is saved at a block by which each level must save more than the one before: less is noise."""


@dataclass(frozen=True)
class Level:
    """A map in the place of a block.

    Attributes:
        rank: Of the map; 0 is a constant.
        error: Held-out error, relative to the best constant's.
        saved: Share of the dense step's cost that it saves.
    """

    rank: int
    error: float
    saved: float

    @property
    def missed(self) -> float:
        """Energy of the block's output that the map misses, over that of its spread."""
        return self.error**2


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
