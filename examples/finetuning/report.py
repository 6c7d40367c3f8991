"""Write what a run found: a table for the reader, JSON and CSV for programs, and a picture of the losses."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tabulate import tabulate

from .arms import TrainedArm
from .measure import Quality, StepTime, StepWork

PACKAGES = ("sparse-compile", "torch", "transformers", "peft", "accelerate", "numpy")
SMOOTHING = 0.9
"""Weight of the past in the moving average that the picture shows."""


@dataclass(frozen=True)
class Result:
    """Everything known about one arm: its step time is that of its kind, and there is no work without a sparse arm."""

    trained: TrainedArm
    quality: Quality
    step_time: StepTime
    work: StepWork | None

    @property
    def flops(self) -> int | None:
        """Return the operations of one step: rewritten for a sparse arm, as captured for a dense one."""
        if self.work is None:
            return None
        return self.work.dense if self.trained.arm.config is None else self.work.rewritten

    @property
    def sparse_sites(self) -> int | None:
        """Return how many sites are computed sparsely."""
        if self.work is None:
            return None
        return 0 if self.trained.arm.config is None else self.work.sparse_sites


@dataclass(frozen=True)
class Spread:
    """A figure over seeds: its mean, and the standard deviation, None of one seed."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise one value for each seed."""
        return cls(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)

    def __format__(self, spec: str) -> str:
        """Format the mean, and the deviation without its sign."""
        unsigned = spec.replace("+", "")
        return f"{self.mean:{spec}}" + ("" if self.deviation is None else f" ± {self.deviation:{unsigned}}")


@dataclass(frozen=True)
class Kind:
    """What is known of an arm over all its seeds.

    Attributes:
        name: of the kind.
        loss: held-out loss.
        above_dense: held-out loss less the dense run's of the same seed; None without dense runs, and for them.
        exact_match: fraction of final answers that are right.
        first: the result of the first seed, whose step was timed.
    """

    name: str
    loss: Spread
    above_dense: Spread | None
    exact_match: Spread
    first: Result


def by_kind(results: Sequence[Result]) -> list[Kind]:
    """Summarise the results over seeds."""
    kinds: dict[str, list[Result]] = {}
    for result in results:
        kinds.setdefault(result.trained.arm.kind, []).append(result)
    dense = {each.trained.arm.seed: each.quality.loss for each in results if each.trained.arm.config is None}
    found = []
    for name, members in kinds.items():
        above = [each.quality.loss - dense[each.trained.arm.seed] for each in members if dense]
        is_dense = members[0].trained.arm.config is None
        found.append(
            Kind(
                name,
                Spread.of([each.quality.loss for each in members]),
                None if is_dense or not above else Spread.of(above),
                Spread.of([each.quality.exact_match for each in members]),
                members[0],
            )
        )
    return found


def table(results: Sequence[Result]) -> str:
    """Lay the results out as a table with one line for each kind of arm."""
    rows = [["arm", "held-out loss", "above dense", "exact match", "step", "speed", "sparse sites", "FLOPs of a step"]]
    for kind in by_kind(results):
        time, work, flops = kind.first.step_time, kind.first.work, kind.first.flops
        rows.append(
            [
                kind.name,
                f"{kind.loss:.4f}",
                "-" if kind.above_dense is None else f"{kind.above_dense:+.4f}",
                f"{kind.exact_match:.1%}",
                f"{1e3 * time.median:.0f} ms",
                "-" if time.speedup is None else f"{time.speedup:.2f}x",
                "-" if work is None else f"{kind.first.sparse_sites}/{work.sites}",
                "-" if work is None or flops is None else f"{flops / 1e9:.1f} G ({flops / work.dense:.0%})",
            ]
        )
    alignment = ["left", *["right"] * (len(rows[0]) - 1)]
    lines = tabulate(rows[1:], rows[0], tablefmt="simple", disable_numparse=True, colalign=alignment)
    return "\n".join([lines, *_notes(results)])


def pages(results: Sequence[Result]) -> list[Path]:
    """Return the page of each kind of sparse step."""
    works = {each.trained.arm.kind: each.work for each in results if each.trained.arm.config is not None}
    return [work.page for work in works.values() if work is not None]


def _notes(results: Sequence[Result]) -> list[str]:
    """Say which steps were sparse, and what the figures can tell."""
    notes = []
    sparse = next((result.trained for result in results if result.trained.sparse_steps), None)
    if sparse is not None:
        first, last, total = sparse.sparse_steps[0], sparse.sparse_steps[-1], len(sparse.losses)
        notes.append(
            f"step time, speed and FLOPs are of a sparse step; those lie from step {first + 1} to {last + 1} of {total}"
        )
    seeds = list(dict.fromkeys(result.trained.arm.seed for result in results))
    if len(seeds) > 1:
        notes.append(
            f"mean ± standard deviation of {len(seeds)} seeds; losses above dense are of runs with the same seed"
        )
    else:
        notes.append("one seed: how far runs lie apart is not known (--seeds 0,1,2)")
    return notes


def save(results: Sequence[Result], run: dict[str, Any], out: Path) -> None:
    """Write `results.json`, `losses.csv` and `comparison.png`.

    Args:
        results: one per arm.
        run: what else to keep in `results.json`: the command's options, the size of the data.
        out: folder, which exists.
    """
    document = {**run, "environment": environment(), "arms": [_as_json(result) for result in results]}
    (out / "results.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    with (out / "losses.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["arm", "step", "loss"])
        for result in results:
            writer.writerows(
                [result.trained.arm.name, i, loss] for i, loss in enumerate(result.trained.losses, start=1)
            )
    _draw(results, out / "comparison.png")


def _as_json(result: Result) -> dict[str, Any]:
    trained = result.trained
    return {
        "name": trained.arm.name,
        "kind": trained.arm.kind,
        "options": None if trained.arm.config is None else trained.arm.config.to_options(),
        "seed": trained.arm.seed,
        "held_out_loss": result.quality.loss,
        "exact_match": result.quality.exact_match,
        "step_seconds": asdict(result.step_time),
        "flops_of_step": result.flops,
        "flops_of_dense_step": None if result.work is None else result.work.dense,
        "sparse_steps": len(trained.sparse_steps),
        "sparse_sites": result.sparse_sites,
        "sites": None if result.work is None else result.work.sites,
        "training": {
            "seconds": trained.seconds,
            "median_step_seconds": statistics.median(trained.step_seconds),
            "last_loss": trained.losses[-1],
            "dense_losses": trained.dense_losses,
        },
        "adapter": f"{trained.arm.name}/{trained.adapter.name}",
    }


def environment() -> dict[str, Any]:
    """Describe the machine and the versions: without them a duration says nothing."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": "cpu" if accelerator is None else str(accelerator),
        "device_name": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _cpu_model() -> str:
    """Return the processor's name; Linux tells it in a file only."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _draw(results: Sequence[Result], path: Path) -> None:
    # Not through pyplot: it would look for a display.
    figure = Figure(figsize=(12, 5), layout="constrained")
    curves, trade = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_losses(curves, by_kind(results))
    _draw_trade(trade, by_kind(results))
    figure.savefig(path, dpi=120)


def _draw_losses(axes: Axes, kinds: Sequence[Kind]) -> None:
    """Draw the losses of the first seed: that of the function which is trained, and that of the dense function."""
    sparse = next((kind.first.trained.sparse_steps for kind in kinds if kind.first.trained.sparse_steps), None)
    if sparse:
        axes.axvspan(sparse[0] + 1, sparse[-1] + 1, color="black", alpha=0.06, linewidth=0, label="sparse phase")
    for kind in kinds:
        trained = kind.first.trained
        steps = range(1, len(trained.losses) + 1)
        (line,) = axes.plot(steps, _smoothed(trained.losses), linewidth=1, alpha=0.6, label=f"{kind.name}, training")
        dense = trained.dense_losses
        label = f"{kind.name}, held out, densely"
        axes.plot(list(dense), list(dense.values()), "o-", color=line.get_color(), markersize=4, label=label)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per answer token)", yscale="log", title="first seed")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")


def _draw_trade(axes: Axes, kinds: Sequence[Kind]) -> None:
    """Draw held-out loss against speed, with error bars where there are several seeds."""
    for kind in kinds:
        time = kind.first.step_time
        axes.errorbar(
            time.speedup or 1.0, kind.loss.mean, yerr=kind.loss.deviation, fmt="o", capsize=4, label=kind.name
        )
    axes.set(xlabel="speed of a sparse step, dense = 1", ylabel="held-out loss after training")
    axes.set_title("mean and standard deviation over seeds" if kinds[0].loss.deviation is not None else "one seed")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _smoothed(values: Sequence[float]) -> list[float]:
    """Return the moving average, without a bias towards its start."""
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = SMOOTHING * total + value, SMOOTHING * weight + 1.0
        smoothed.append(total / weight)
    return smoothed
