"""Search recipes for the least loss and the least cost, and measure each one that is looked at as a whole.

A greedy path begins at the dense model. Each step takes one block one level further, the block whose step raises the
held-out loss least for the cost that it saves, measured with all maps so far in place. Which block that is, is found as
in the accelerated greedy algorithm (Minoux 1978): what was measured some steps ago is an estimate, and only the block
that looks best is measured anew, until one that was measured now looks best. Where fewer measurements are left than
blocks, several of those that look best take a step at once.

An exit of context goes its way as a block does: each step has context leave one block earlier, and takes the maps of
the blocks behind with it.

All that was measured is kept: the goal is met by the best of these points, and those that no other point beats in both
respects are the curve.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sparse_compile.calibration.goals import Goal
from sparse_compile.calibration.levels import Level, share_saved, without_covered

__all__ = ["Point", "Search", "pareto"]


@dataclass(frozen=True)
class Point:
    """A recipe that was measured as a whole.

    Attributes:
        levels: By site name, the map in the place of the block; a site that is not named is dense. The exit of context
            is one of them, and there is no map behind it.
        rise: Of the held-out loss, nats a token; infinite where the loss is not finite.
    """

    levels: Mapping[str, Level]
    rise: float

    @property
    def cost(self) -> float:
        """Cost of a training step, over that of the dense one."""
        return max(0.0, 1 - share_saved(self.levels))


def pareto(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other beats in loss and cost, the most expensive first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda each: (each.cost, each.rise)):
        if math.isfinite(point.rise) and (not front or point.rise < front[-1].rise):
            front.append(point)
    return front[::-1]


class Search:
    """A search for the recipes of one model.

    Args:
        hulls: By site name, the levels that it may take, in this order.
        measure: Returns the rise of the held-out loss with some levels in place.
        goal: What ends the path: a loss that is too high, or a cost that is low enough.
        measurements: How many may be made.

    Attributes:
        points: All that were measured, the dense model first.
        alone: By site name, the rise with its first level alone in place; only of sites that were measured so.
    """

    def __init__(
        self,
        hulls: Mapping[str, Sequence[Level]],
        measure: Callable[[Mapping[str, Level]], float],
        goal: Goal,
        measurements: int,
    ) -> None:
        self.hulls = hulls
        self.goal = goal
        self.points = [Point({}, 0.0)]
        self.alone: dict[str, float] = {}
        self._measure = measure
        self._left = measurements
        self._here = self.points[0]
        self._open = {name for name, hull in hulls.items() if hull}
        # What a step is believed to add to the loss, by site; without a measurement all energy counts alike.
        self._added = {name: hulls[name][0].missed for name in hulls if name in self._open}

    def run(self) -> None:
        """Make the measurements."""
        if self._left >= 2 * len(self._open):
            self._measure_alone()
        if self.goal.name == "loss_budget" and self._left and self._open:
            # The whole first: where it fits, the path begins there.
            whole = self._try({name: self.hulls[name][0] for name in self._names()})
            if self.goal.met_by(whole.cost, whole.rise):
                self._move_to(whole)
        most = len(self._open)
        while self._free and self._names() and self._here.cost > self._target():
            count = min(most, max(1, math.ceil(self._dense / self._free)))
            if count == 1:
                self._step()
            elif not self._step_many(count):
                most = count // 2
        if self.goal.name == "loss_budget":
            self._fill()
        else:
            self._go_on_unmeasured()
            self._take_back()

    @property
    def _free(self) -> int:
        """How many measurements may be made now: the end of a path that must reach a cost is measured in any case."""
        return max(0, self._left - (self.goal.name != "loss_budget"))

    @property
    def _dense(self) -> int:
        """How many of the blocks that may go further are dense yet."""
        return sum(name not in self._here.levels for name in self._names())

    def _target(self) -> float:
        """Return the cost at which the path ends."""
        return 0.0 if self.goal.name == "loss_budget" else self.goal.most_cost

    def _measure_alone(self) -> None:
        for name in self._names():
            self.alone[name] = self._added[name] = self._try({name: self.hulls[name][0]}).rise
            if not self._bearable(self.alone[name]):
                self._open.discard(name)

    def _step(self) -> None:
        """Take the block that adds least loss for its saving one level further, or close those that cost too much."""
        patience = max(1, self._free // (self._dense or len(self._names())))
        tried: dict[str, Point] = {}
        while self._names():
            best = min(self._names(), key=self._rate)
            if best in tried:
                self._move_to(tried[best])
                return
            if not self._free or len(tried) == patience:
                break
            tried[best] = self._try(self._with_next(best))
            self._added[best] = tried[best].rise - self._here.rise
            if not self._bearable(tried[best].rise):
                self._open.discard(best)
                del tried[best]
        if tried:
            self._move_to(tried[min(tried, key=self._rate)])

    def _step_many(self, count: int) -> bool:
        """Take the blocks that look best one level further at once; return whether that is bearable."""
        names = sorted(self._names(), key=self._rate)[:count]
        levels = dict(self._here.levels)
        for name in names:
            if Point(levels, 0.0).cost <= self._target():
                break
            levels = without_covered({**levels, name: self._next(name)})
        found = self._try(levels)
        if self._bearable(found.rise):
            self._move_to(found)
            return True
        return False

    def _fill(self) -> None:
        """Measure some recipes between none and all, for the curve: a path that began at all has left them out."""
        rates = {
            name: self.alone.get(name, hull[0].missed) / hull[0].saved for name, hull in self.hulls.items() if hull
        }
        order = sorted((name for name in rates if math.isfinite(rates[name])), key=rates.__getitem__)
        for quarter in (2, 1, 3):
            names = order[: round(quarter * len(order) / 4)]
            if self._left and names:
                self._try({name: self.hulls[name][0] for name in names})

    def _go_on_unmeasured(self) -> None:
        """Where the measurements run out before the path ends, go on by what is believed, and measure its end."""
        while self._names() and self._here.cost > self._target():
            best = min(self._names(), key=self._rate)
            self._move_to(Point(self._with_next(best), self._here.rise))
        if self._left:
            self._here = self._try(self._here.levels)

    def _take_back(self) -> None:
        """Undo steps that the goal does not need, the dearest first: the last one may have gone too far."""
        while True:
            found = [self._try(levels) for levels in self._shorter() if self._left]
            best = min(found, key=lambda each: each.rise, default=self._here)
            if not best.rise < self._here.rise:
                return
            self._here = best

    def _shorter(self) -> Iterator[dict[str, Level]]:
        """Yield what is left without one step of a block, where it still meets the goal."""
        for name, level in self._here.levels.items():
            levels = {each: found for each, found in self._here.levels.items() if each != name}
            if at := self.hulls[name].index(level):
                levels[name] = self.hulls[name][at - 1]
            if self.goal.met_by(Point(levels, 0.0).cost, 0.0):
                yield levels

    def _names(self) -> list[str]:
        """Return the blocks that may go further, in the order of the model: those whose next step saves something."""
        return [name for name in self.hulls if name in self._open and self._gain(name) > 0]

    def _with_next(self, name: str) -> dict[str, Level]:
        """Return the levels with a block one step further."""
        return without_covered({**self._here.levels, name: self._next(name)})

    def _gain(self, name: str) -> float:
        """Return what a block's next step saves: of a block that context has left before, nothing."""
        return share_saved(self._with_next(name)) - share_saved(self._here.levels)

    def _next(self, name: str) -> Level:
        hull = self.hulls[name]
        return hull[hull.index(self._here.levels[name]) + 1] if name in self._here.levels else hull[0]

    def _rate(self, name: str) -> float:
        """Return the loss that a block's next step is believed to add, for the cost that it saves."""
        return self._added[name] / self._gain(name)

    def _bearable(self, rise: float) -> bool:
        return rise <= self.goal.most_rise and math.isfinite(rise)

    def _try(self, levels: Mapping[str, Level]) -> Point:
        levels = without_covered(levels)
        known = next((each for each in self.points if each.levels == levels), None)
        if known is not None:
            return known
        self._left -= 1
        self.points.append(Point(levels, self._measure(levels)))
        return self.points[-1]

    def _move_to(self, point: Point) -> None:
        """Go on from a point; believe of the further steps what the energies that they miss say."""
        for name, level in point.levels.items():
            before = self._here.levels.get(name)
            if level == before:
                continue
            hull = self.hulls[name]
            if level == hull[-1]:
                self._open.discard(name)
                continue
            energy = level.missed - (0.0 if before is None else before.missed)
            further = hull[hull.index(level) + 1].missed - level.missed
            if energy > 0:
                self._added[name] *= further / energy
            else:  # an exit without maps tells nothing of one with maps
                self._added[name] = further * self._loss_of_energy()
        self._here = point

    def _loss_of_energy(self) -> float:
        """Return the loss that a unit of energy missed costs, in the mean of blocks alone; 1 where none is known."""
        known = {name: rise for name, rise in self.alone.items() if math.isfinite(rise)}
        energy = sum(self.hulls[name][0].missed for name in known)
        return sum(known.values()) / energy if energy > 0 else 1.0
