"""Choose a recipe for a goal: search with as many held-out batches as can be afforded, then check with all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sparse_compile.calibration.fits import Fits
from sparse_compile.calibration.goals import Goal
from sparse_compile.calibration.held_out import HeldOut
from sparse_compile.calibration.levels import EXIT, Level, ranks_of, without_covered
from sparse_compile.calibration.search import Point, Search

__all__ = ["Choice", "choose"]

_CHECKS: Final = 3
_MEASUREMENTS_PER_SITE: Final = 3
"""Alone, and about twice on the path."""

Hulls = Mapping[str, Sequence[Level]]


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        point: The recipe; the dense model where the goal is out of reach.
        rise: Of the held-out loss with it, over all held-out batches.
        reason: Why it is the dense model; empty where the goal is met.
        points: All recipes that were measured, the dense model first.
        alone: By site name, the rise with its first map alone in place, where it was measured.
    """

    point: Point
    rise: float
    reason: str
    points: Sequence[Point]
    alone: Mapping[str, float]


def choose(goal: Goal, hulls: Hulls, fits: Fits, held_out: HeldOut, forwards: int) -> Choice:
    """Choose a recipe.

    Args:
        goal: What for.
        hulls: By site name, and for the exit, the levels that are worthwhile, in order.
        fits: Their maps.
        held_out: Measures losses.
        forwards: How many forwards may be made.
    """

    def rise(levels: Mapping[str, Level], count: int | None = None) -> float:
        return held_out.rise(*fits.placed(levels), count)

    hulls = {name: hull for name, hull in hulls.items() if hull}
    dense = Point({}, 0.0)
    if not hulls:
        return Choice(dense, 0.0, "no block has a map that is cheaper", [dense], {})
    cheapest = Point(without_covered({name: hull[-1] for name, hull in hulls.items()}), 0.0)
    if cheapest.cost > goal.most_cost:
        cheapest = Point(cheapest.levels, rise(cheapest.levels))
        return Choice(dense, 0.0, _too_far(goal, cheapest), [dense, cheapest], {})
    count, measurements, checks = _plan(forwards, len(hulls), len(held_out.batches))
    search = Search(hulls, lambda levels: rise(levels, count), goal, measurements)
    search.run()
    candidates = [each for each in search.points if each.levels and goal.met_by(each.cost, each.rise)]
    candidates.sort(key=lambda each: goal.order(each.cost, each.rise))
    # Each candidate but the first is there in case that one fails on the batches that the search has not seen.
    low, high = 0, len(candidates)
    found: tuple[Point, float] | None = None
    failed: float | None = None
    while low < high and checks:
        middle = (low + high) // 2 if failed is not None else 0
        rises = rise(candidates[middle].levels)
        checks -= 1
        if goal.met_by(candidates[middle].cost, rises):
            found, high = (candidates[middle], rises), middle
        else:
            failed, low = rises, middle + 1
    if found is None:
        return Choice(search.points[0], 0.0, _too_dear(goal, search.points, failed), search.points, search.alone)
    return Choice(*found, "", search.points, search.alone)


def _plan(forwards: int, sites: int, held_out: int) -> tuple[int, int, int]:
    """Return how many held-out batches the search measures with, how many measurements it may make, and checks."""
    count = min(held_out, max(1, forwards // (_MEASUREMENTS_PER_SITE * sites)))
    unseen = held_out - count
    checks = max(1, min(_CHECKS, forwards // (3 * unseen))) if unseen else 1
    return count, max(1, (forwards - checks * unseen) // count), checks


def _too_far(goal: Goal, cheapest: Point) -> str:
    reached = f"{1 / max(cheapest.cost, 1e-6):.2f}x" if goal.name == "speedup" else f"{cheapest.cost:.1%} of the FLOPs"
    leaves = f" and context leaving before {cheapest.levels[EXIT].leaves}" if EXIT in cheapest.levels else ""
    blocks = len(ranks_of(cheapest.levels))
    return f"the cheapest map in each of {blocks} blocks{leaves} gives {reached}, at {cheapest.rise:+.4f}"


def _too_dear(goal: Goal, points: Sequence[Point], failed: float | None) -> str:
    if failed is not None:
        return f"what meets it on some of the held-out batches costs {failed:+.4f} on all of them"
    least = min((each for each in points if each.levels), key=lambda each: each.rise, default=None)
    if least is None or not math.isfinite(least.rise):
        return "with maps in place the loss is not finite"
    if goal.name == "loss_budget":
        return f"of all that was measured, {_described(least.levels)} costs least, {least.rise:+.4f}"
    return f"every recipe that reaches it breaks the loss; {1 / max(least.cost, 1e-6):.2f}x costs {least.rise:+.4f}"


def _described(levels: Mapping[str, Level]) -> str:
    parts = [f"a map of {name}" for name in ranks_of(levels)]
    if EXIT in levels:
        parts.append(f"context leaving before {levels[EXIT].leaves}")
    return " with ".join(parts)
