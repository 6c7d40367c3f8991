"""Turn what a search has found into the tables of a calibration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from sparse_compile.calibration.choice import Choice
from sparse_compile.calibration.levels import EXIT, Level, ranks_of
from sparse_compile.calibration.result import CurvePoint, SiteCalibration
from sparse_compile.calibration.search import pareto

__all__ = ["curve_of", "exits_of", "sites_of"]

Hulls = Mapping[str, Sequence[Level]]


def sites_of(found: Choice, hulls: Hulls) -> tuple[SiteCalibration, ...]:
    """Return what was found out about each site, those chosen first, and then those that alone cost least."""
    chosen = found.point.levels
    sites = [
        SiteCalibration(name, level.rank, level.error, level.saved, found.alone.get(name), name in chosen)
        for name, level in ((name, chosen.get(name, hull[0])) for name, hull in hulls.items() if name != EXIT)
    ]
    return tuple(sorted(sites, key=lambda site: (not site.chosen, math.inf if site.rise is None else site.rise)))


def exits_of(found: Choice, hulls: Hulls) -> tuple[SiteCalibration, ...]:
    """Return what was found out about each exit, the deepest first."""
    alone = {each.levels[EXIT]: each.rise for each in found.points if list(each.levels) == [EXIT]}
    chosen = found.point.levels.get(EXIT)
    return tuple(
        SiteCalibration(each.leaves, each.rank, each.error, each.saved, alone.get(each), each == chosen)
        for each in hulls[EXIT]
    )


def curve_of(found: Choice, dense: float) -> tuple[CurvePoint, ...]:
    """Return the recipes that no other beats; the dense model and what was chosen are there in any case."""
    points = {id(each): each for each in (found.points[0], *pareto(found.points), found.point)}
    return tuple(
        CurvePoint(
            dense * each.cost,
            each.rise,
            ranks_of(each.levels),
            each.levels == found.point.levels,
            each.levels[EXIT].leaves if EXIT in each.levels else "",
        )
        for each in sorted(points.values(), key=lambda each: -each.cost)
    )
