"""What a calibration found, as data, as a table and as a picture."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tabulate import tabulate

from sparse_compile.calibration.goals import Goal
from sparse_compile.calibration.levels import EXIT
from sparse_compile.options.recipe import Recipe

__all__ = ["Calibration", "CurvePoint", "SiteCalibration"]


@dataclass(frozen=True)
class SiteCalibration:
    """What was found out about one site, or about one exit of context.

    Attributes:
        name: Site name; of an exit the attention block before which context leaves.
        rank: Rank of the map that was chosen for it, or of the one that would have come first; 0 is a constant. Of an
            exit, of the maps of all blocks behind.
        error: Held-out error of that map, relative to the best constant's; of several maps the root of the mean square.
        saved: What that map is expected to save, as a share of the dense step's cost.
        rise: Rise of the held-out loss with the first map of this site, or exit, alone in place, nats a token; None
            where it was not measured.
        chosen: Whether the recipe has it.
    """

    name: str
    rank: int
    error: float
    saved: float
    rise: float | None
    chosen: bool


@dataclass(frozen=True)
class CurvePoint:
    """A recipe that no other beats in loss and in cost.

    Attributes:
        cost: Expected seconds of a training step, or its FLOPs over those of the dense one.
        rise: Measured rise of the held-out loss, nats a token.
        sites: Rank of the map, by site name.
        chosen: Whether it is the recipe of the calibration.
        exit: The attention block before which context leaves; empty where it stays to the end.
    """

    cost: float
    rise: float
    sites: Mapping[str, int]
    chosen: bool
    exit: str = ""


@dataclass(frozen=True)
class Calibration:
    """A recipe, and what it was chosen from.

    Attributes:
        recipe: The recipe; of no site and without an exit where the goal is out of reach.
        goal: What it was chosen for.
        reason: Why the recipe is empty, and how far one can get; empty where the goal is met.
        loss: Held-out loss of the model as it is, nats a token.
        rise: How much higher it is with the whole recipe in place, measured on all held-out batches.
        unit: Of costs: `"seconds"` of a training step on this machine, or `"flops"`, as a share of the dense step's.
        dense_cost: Of the step as it is: measured seconds, or 1.
        expected_cost: Of the step with the recipe: the dense one less what its maps save, not measured.
        sites: Every site that could be measured, those chosen first.
        curve: The recipes that no other beats, the dense model first. Rises are those of the search, which may have
            used some of the held-out batches alone.
        exits: Every exit that could be measured, the deepest first.
        declined: By site name, why a site has no map; by `"context exit"`, why context is not to leave.
        tokens: Number of context tokens that maps were fitted on.
        forwards: What the calibration cost, in forwards of a batch; a measured training step counts as two.
    """

    recipe: Recipe
    goal: Goal
    reason: str
    loss: float
    rise: float
    unit: Literal["seconds", "flops"]
    dense_cost: float
    expected_cost: float
    sites: tuple[SiteCalibration, ...]
    curve: tuple[CurvePoint, ...]
    exits: tuple[SiteCalibration, ...] = ()
    declined: Mapping[str, str] = field(default_factory=dict)
    tokens: int = 0
    forwards: int = 0

    @property
    def speedup(self) -> float:
        """How many times as fast a step is expected to be; of FLOPs the limit."""
        return self.dense_cost / self.expected_cost

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the curve into a file, with the chosen recipe marked.

        Args:
            path: A file whose suffix names its kind, such as `.png` or `.svg`.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "Calibration.plot needs matplotlib: pip install matplotlib. The same points are in Calibration.curve."
            ) from error
        # Not through pyplot: it would look for a display.
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot([each.cost for each in self.curve], [each.rise for each in self.curve], marker="o", color="tab:gray")
        for each in self.curve:
            exit_ = f", exit {each.exit}" if each.exit else ""
            axes.annotate(
                f"{len(each.sites)}{exit_}", (each.cost, each.rise), xytext=(4, 4), textcoords="offset points"
            )
        chosen = [each for each in self.curve if each.chosen]
        axes.scatter([p.cost for p in chosen], [p.rise for p in chosen], s=120, zorder=3, label=f"chosen: {self.goal}")
        unit = "expected seconds of a step" if self.unit == "seconds" else "FLOPs of a step, share of the dense one"
        axes.set(
            xlabel=unit, ylabel="rise of the held-out loss (nats a token)", title="Recipes, by number of maps and exit"
        )
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(path, dpi=150)

    def __str__(self) -> str:
        chosen = sum(site.chosen for site in self.sites)
        leaves = f", which leave before {self.recipe.exit.site}" if self.recipe.exit else ""
        summary = (
            f"{chosen} of {len(self.sites)} feed-forward blocks get a map for context tokens{leaves}: held-out loss "
            f"{self.loss:.4f} -> {self.loss + self.rise:.4f} ({self.rise:+.4f}), fitted on {self.tokens} tokens"
        )
        lines = [
            summary,
            self._cost_line(),
            *([f"goal {self.goal} is not met: {self.reason}"] if self.reason else []),
            "",
            tabulate(
                [*map(_row, self.sites), *(_row(each, f"{EXIT} before ") for each in self.exits)],
                ("site", "rank", "error", "loss alone", "saves", "chosen"),
                tablefmt="plain",
                disable_numparse=True,
            ),
            *(f"{name}: {reason}" for name, reason in self.declined.items()),
        ]
        return "\n".join(lines)

    def _cost_line(self) -> str:
        if self.unit == "flops":
            cost = f"{self.expected_cost:.1%} of the dense step's FLOPs"
        else:
            cost = (
                f"{self.dense_cost:.4g} s a step as it is (measured), {self.expected_cost:.4g} s expected, "
                f"{self.speedup:.2f}x"
            )
        return f"{cost}; goal {self.goal}; {self.forwards} forwards"


def _row(site: SiteCalibration, prefix: str = "") -> tuple[Any, ...]:
    alone = "-" if site.rise is None else f"{site.rise:+.4f}"
    return (
        prefix + site.name,
        site.rank,
        f"{site.error:.3f}",
        alone,
        f"{site.saved:.1%}",
        "yes" if site.chosen else "no",
    )
