"""What a recipe is chosen for: a rise of the loss that it may cost, or a cost that it must reach."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

__all__ = ["DEFAULT_LOSS_BUDGET", "Goal", "goal_of"]

DEFAULT_LOSS_BUDGET = 0.01
"""Rise of the held-out loss, in nats a token, that a recipe may cost unless the user says otherwise."""


@dataclass(frozen=True)
class Goal:
    """The goal of a calibration.

    Attributes:
        name: Which of the three arguments of `calibrate` was given.
        value: Its value.
    """

    name: Literal["loss_budget", "speedup", "flops"]
    value: float

    @property
    def most_cost(self) -> float:
        """The cost of a step, over that of the dense one, that a recipe must not exceed."""
        if self.name == "loss_budget":
            return math.inf
        return 1 / self.value if self.name == "speedup" else self.value

    @property
    def most_rise(self) -> float:
        """The rise of the held-out loss, nats a token, that a recipe must not exceed."""
        return self.value if self.name == "loss_budget" else math.inf

    def met_by(self, cost: float, rise: float) -> bool:
        """Tell whether a recipe meets the goal.

        Args:
            cost: Of a training step, over that of the dense one.
            rise: Of the held-out loss, nats a token.
        """
        # What sums of savings round off must not decide.
        return math.isfinite(rise) and rise <= self.most_rise and cost <= self.most_cost * (1 + 1e-9)

    def order(self, cost: float, rise: float) -> tuple[float, float]:
        """Return the key by which recipes that meet the goal are sorted, the best first."""
        return (cost, rise) if self.name == "loss_budget" else (rise, cost)

    def __str__(self) -> str:
        return f"{self.name}={self.value:g}"


def goal_of(loss_budget: float | None, speedup: float | None, flops: float | None) -> Goal:
    """Return the goal that was given, of which there may be one; without any, the default loss budget.

    Raises:
        ValueError: Two goals at once, or a value that makes no sense.
    """
    given = {"loss_budget": loss_budget, "speedup": speedup, "flops": flops}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise ValueError(f"a calibration has one goal, and {' and '.join(named)} are two: give one of them")
    # NaN fails each of these comparisons.
    if loss_budget is not None and not loss_budget >= 0:
        raise ValueError(f"loss_budget is a rise of the loss of at least 0, got {loss_budget!r}")
    if speedup is not None and not 1 < speedup < math.inf:
        raise ValueError(f"speedup is how many times as fast a step is to be, above 1, got {speedup!r}")
    if flops is not None and not 0 < flops < 1:
        raise ValueError(f"flops is a share of the dense step's FLOPs between 0 and 1, got {flops!r}")
    if speedup is not None:
        return Goal("speedup", speedup)
    if flops is not None:
        return Goal("flops", flops)
    return Goal("loss_budget", DEFAULT_LOSS_BUDGET if loss_budget is None else loss_budget)
