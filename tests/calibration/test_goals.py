"""The goals of a calibration: which is meant, what meets it, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sparse_compile.calibration.goals import DEFAULT_LOSS_BUDGET, Goal, goal_of


def goal(**given: Any) -> Goal:
    return goal_of(**{"loss_budget": None, "speedup": None, "flops": None, **given})


def test_without_a_goal_it_is_the_default_budget() -> None:
    assert goal() == Goal("loss_budget", DEFAULT_LOSS_BUDGET)
    assert goal(loss_budget=0) == Goal("loss_budget", 0)


@pytest.mark.parametrize(
    ("given", "cost", "rise", "met"),
    [
        ({"loss_budget": 0.1}, 1.0, 0.1, True),
        ({"loss_budget": 0.1}, 0.1, 0.11, False),
        ({"speedup": 2.0}, 0.5, 9.0, True),
        ({"speedup": 2.0}, 0.51, 0.0, False),
        ({"flops": 0.7}, 0.7, 9.0, True),
        ({"flops": 0.7}, 0.71, 0.0, False),
        ({"flops": 0.7}, 0.5, math.inf, False),
    ],
    ids=str,
)
def test_what_meets_a_goal(given: dict[str, float], cost: float, rise: float, met: bool) -> None:
    assert goal(**given).met_by(cost, rise) == met


def test_the_best_recipe_is_the_cheapest_in_a_budget_and_the_one_of_least_loss_at_a_cost() -> None:
    points = [(0.4, 0.2), (0.5, 0.1), (0.4, 0.3)]
    assert min(points, key=lambda each: goal(loss_budget=1).order(*each)) == (0.4, 0.2)
    assert min(points, key=lambda each: goal(speedup=2).order(*each)) == (0.5, 0.1)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"loss_budget": 0.1, "speedup": 2.0}, "loss_budget and speedup are two"),
        ({"speedup": 2.0, "flops": 0.5}, "speedup and flops are two"),
        ({"loss_budget": -0.1}, "loss_budget"),
        ({"loss_budget": math.nan}, "loss_budget"),
        ({"speedup": 1.0}, "speedup"),
        ({"speedup": math.inf}, "speedup"),
        ({"speedup": math.nan}, "speedup"),
        ({"flops": 0.0}, "flops"),
        ({"flops": 1.0}, "flops"),
        ({"flops": math.nan}, "flops"),
    ],
    ids=str,
)
def test_wrong_goals_are_refused(given: dict[str, float], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        goal(**given)
