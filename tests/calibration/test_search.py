"""The search on losses that are known: what it finds, how many measurements it makes, and what it does with few."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping

import pytest

from sparse_compile.calibration.goals import Goal
from sparse_compile.calibration.levels import EXIT, Level
from sparse_compile.calibration.search import Point, Search, pareto

LEVELS = (Level(32, 0.5, 0.08), Level(0, 1.0, 0.1))
"""Of each of eight blocks."""

HULLS = {f"block {i}": LEVELS for i in range(8)}
WEIGHTS = {"block 0": 9.0, "block 1": 1.0, "block 2": 4.0, "block 3": 2.0, "block 4": 7.0, "block 5": 3.0,
           "block 6": 5.0, "block 7": 40.0}  # fmt: skip
BUDGET = Goal("loss_budget", 2.0)

Levels = Mapping[str, Level]


def added(levels: Levels) -> float:
    """A loss that adds up."""
    return sum(WEIGHTS[name] * level.missed for name, level in levels.items())


def in_company(levels: Levels) -> float:
    """A loss that does not: of two neighbours that have maps, both cost twice."""
    total = 0.0
    for name, level in levels.items():
        neighbours = {f"block {int(name[-1]) + step}" for step in (-1, 1)}
        total += WEIGHTS[name] * level.missed * (2 if neighbours & levels.keys() else 1)
    return total


def search(loss: Callable[[Levels], float], goal: Goal, measurements: int = 100) -> tuple[Search, int]:
    """Search; return the search, and how often it measured."""
    calls: list[Levels] = []

    def measure(levels: Levels) -> float:
        assert levels not in calls, "nothing is measured twice"
        calls.append(dict(levels))
        return loss(levels)

    found = Search(HULLS, measure, goal, measurements)
    found.run()
    assert len(calls) <= measurements and len(found.points) == len(calls) + 1
    assert all(each.rise == loss(each.levels) for each in found.points), "each is measured as a whole"
    return found, len(calls)


def best(found: Search) -> Point:
    return min(
        (each for each in found.points if found.goal.met_by(each.cost, each.rise)),
        key=lambda each: found.goal.order(each.cost, each.rise),
    )


def least_cost(loss: Callable[[Levels], float], budget: float) -> float:
    """The least cost within a budget, of all recipes that there are."""
    found = math.inf
    for choice in itertools.product((None, *LEVELS), repeat=len(HULLS)):
        levels = {name: level for name, level in zip(HULLS, choice, strict=True) if level is not None}
        if loss(levels) <= budget:
            found = min(found, Point(levels, 0.0).cost)
    return found


@pytest.mark.parametrize("budget", [0.2, 2.0, 3.0, 100.0])
@pytest.mark.parametrize("loss", [added, in_company])
def test_the_cheapest_recipe_in_a_budget_is_found(loss: Callable[[Levels], float], budget: float) -> None:
    found, _ = search(loss, Goal("loss_budget", budget))
    assert best(found).cost == pytest.approx(least_cost(loss, budget), abs=0.03)
    assert best(found).rise <= budget


def test_losses_are_those_in_company() -> None:
    """Alone, block 3 costs less than block 5; beside block 1 and 2 it costs more."""
    found, _ = search(in_company, Goal("loss_budget", 2.5))
    alone_order = sorted(WEIGHTS, key=WEIGHTS.__getitem__)
    assert alone_order[:3] == ["block 1", "block 3", "block 5"]
    naive = dict.fromkeys(("block 1", "block 3", "block 2"), LEVELS[0])
    assert in_company(naive) > 2.5 and set(best(found).levels) != set(naive)
    assert found.alone == {name: WEIGHTS[name] * 0.25 for name in WEIGHTS}


@pytest.mark.parametrize("goal", [Goal("speedup", 1.25), Goal("flops", 0.5), Goal("speedup", 4.0)], ids=str)
@pytest.mark.parametrize("measurements", [100, 20, 8, 3, 1])
def test_a_cost_is_reached_with_however_few_measurements(goal: Goal, measurements: int) -> None:
    found, _ = search(in_company, goal, measurements)
    assert best(found).cost <= goal.most_cost


def test_at_a_cost_more_measurements_find_less_loss() -> None:
    rises = [best(search(in_company, Goal("flops", 0.6), count)[0]).rise for count in (1, 12, 100)]
    assert rises[0] >= rises[1] >= rises[2] and rises[0] > rises[2]
    assert rises[2] <= 1.3 * min(
        in_company({name: level for name, level in zip(HULLS, choice, strict=True) if level})
        for choice in itertools.product((None, *LEVELS), repeat=8)
        if sum(level.saved for level in choice if level) >= 0.4 - 1e-9
    )


@pytest.mark.parametrize("measurements", [1, 2, 5, 8, 12, 20])
def test_a_budget_is_kept_with_however_few_measurements(measurements: int) -> None:
    found, _ = search(added, BUDGET, measurements)
    points = [each for each in found.points if each.rise <= BUDGET.value]
    assert points and (measurements < 5 or min(each.cost for each in points) < 1)


def test_where_all_fits_the_path_begins_at_all() -> None:
    found, count = search(added, Goal("loss_budget", 1e6))
    assert best(found).levels == dict.fromkeys(HULLS, LEVELS[1])
    assert count == 8 + 1 + 8 + 3, "each alone, all, a last level each, and three for the curve"
    sizes = sorted(len(each.levels) for each in pareto(found.points))
    assert {0, 2, 4, 6, 8} <= set(sizes)


def test_steps_that_the_cost_does_not_need_are_taken_back() -> None:
    """A large block that costs much is needed in no company of the others, but looks best when nothing is there yet."""
    hulls = {"large": (Level(8, 0.5, 0.5),), "small": (Level(8, 0.5, 0.2),), "other": (Level(8, 0.5, 0.4),)}

    def loss(levels: Levels) -> float:
        # For each share saved: large 2, small 1, other 1.5.
        return sum({"large": 1.0, "small": 0.2, "other": 0.6}[name] for name in levels)

    found = Search(hulls, loss, Goal("flops", 0.5), 100)
    found.run()
    assert set(best(found).levels) == {"small", "other"}
    further = Search(hulls, loss, Goal("flops", 0.35), 100)
    further.run()
    # The path is small, other, large; of these, small is not needed.
    assert set(best(further).levels) == {"large", "small"}


def test_what_breaks_the_loss_is_in_no_recipe() -> None:
    def loss(levels: Levels) -> float:
        return math.inf if "block 3" in levels else added(levels)

    for goal in (Goal("loss_budget", 1e6), Goal("flops", 0.5)):
        found, _ = search(loss, goal)
        assert "block 3" not in best(found).levels and len(best(found).levels) >= 5
        assert found.alone["block 3"] == math.inf


EXITS = tuple(
    Level(
        16,
        0.1 * maps,
        0.13 * (maps + 1),
        maps,
        f"block {7 - maps}",
        frozenset(f"block {i}" for i in range(7 - maps, 8)),
    )
    for maps in range(7)
)
"""Exits of eight blocks: each saves a feed-forward block more than the one before, and some beside it."""


def exit_added(levels: Levels) -> float:
    """A loss that adds up, also of an exit."""
    blocks = {name: level for name, level in levels.items() if name != EXIT}
    return added(blocks) + (2.0 * levels[EXIT].missed if EXIT in levels else 0.0)


@pytest.mark.parametrize("goal", [Goal("loss_budget", 0.5), Goal("loss_budget", 4.0), Goal("flops", 0.4)], ids=str)
def test_an_exit_goes_its_way_beside_the_blocks_and_takes_their_maps_with_it(goal: Goal) -> None:
    found = Search({**HULLS, EXIT: EXITS}, exit_added, goal, 100)
    found.run()
    chosen = best(found)
    assert EXIT in chosen.levels and found.alone[EXIT] == 0.0
    assert not chosen.levels.keys() & chosen.levels[EXIT].covered, "no map is behind the exit"
    assert chosen.cost == pytest.approx(1 - sum(each.saved for each in chosen.levels.values()))
    for point in found.points:
        covered = point.levels[EXIT].covered if EXIT in point.levels else frozenset()
        assert not covered & point.levels.keys()
    # Of all recipes with one level of each kind there is none that is much better.
    least = min(
        (
            Point({**{name: level for name in HULLS if name not in each.covered and name in some}, EXIT: each}, 0.0)
            for each in EXITS
            for level in LEVELS
            for count in range(9)
            for some in itertools.combinations(HULLS, count)
        ),
        key=lambda point: (
            goal.order(point.cost, exit_added(point.levels))
            if goal.met_by(point.cost, exit_added(point.levels))
            else (math.inf, math.inf)
        ),
    )
    assert goal.order(chosen.cost, chosen.rise)[0] <= goal.order(least.cost, exit_added(least.levels))[0] + 0.1


def test_a_block_that_context_has_left_before_takes_no_step() -> None:
    """The exit is free and saves all: nothing is left to measure but it."""
    free = Level(0, 0.0, 0.9, 0, "block 0", frozenset(HULLS))
    calls: list[Levels] = []
    found = Search(
        {**HULLS, EXIT: (free,)}, lambda levels: calls.append(levels) or exit_added(levels), Goal("flops", 0.5), 9
    )
    found.run()
    assert best(found).levels == {EXIT: free} and calls == [{EXIT: free}]


def test_no_point_of_the_curve_beats_another() -> None:
    found, _ = search(in_company, BUDGET)
    curve = pareto(found.points)
    assert len(curve) > 3 and curve[0].levels == {}
    for one, other in itertools.pairwise(curve):
        assert one.cost > other.cost and one.rise < other.rise
    for point in found.points:
        assert any(each.cost <= point.cost and each.rise <= point.rise for each in curve)


def test_infinite_losses_are_not_in_the_curve() -> None:
    assert pareto([Point({}, 0.0), Point({"block 0": LEVELS[0]}, math.inf)]) == [Point({}, 0.0)]
