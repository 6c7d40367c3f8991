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
from matplotlib.figure import Figure
from tabulate import tabulate

from .arms import TrainedArm
from .measure import Quality, StepTime, StepWork

PACKAGES = ("sparse-compile", "torch", "transformers", "peft", "accelerate", "numpy")
SMOOTHING = 0.9
"""Weight of the past in the moving average that the picture shows."""


@dataclass(frozen=True)
class Result:
    """Everything known about one arm; what was not measured is None."""

    trained: TrainedArm
    quality: Quality
    step_time: StepTime | None
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


def table(results: Sequence[Result]) -> str:
    """Lay the results out as a table with one line per arm."""
    rows = [["arm", "held-out loss", "exact match", "step", "vs dense", "sparse sites", "FLOPs of a step"]]
    for result in results:
        time, work, flops = result.step_time, result.work, result.flops
        rows.append(
            [
                result.trained.arm.name,
                f"{result.quality.loss:.4f}",
                f"{result.quality.exact_match:.1%}",
                "-" if time is None else f"{1e3 * time.median:.0f} ms",
                "-" if time is None or time.speedup is None else f"{time.speedup:.2f}x",
                "-" if work is None else f"{result.sparse_sites}/{work.sites}",
                "-" if work is None or flops is None else f"{flops / 1e9:.1f} G ({flops / work.dense:.0%})",
            ]
        )
    alignment = ["left", *["right"] * (len(rows[0]) - 1)]
    lines = tabulate(rows[1:], rows[0], tablefmt="simple", disable_numparse=True, colalign=alignment)
    return "\n".join([lines, *_notes(results)])


def _notes(results: Sequence[Result]) -> list[str]:
    """Say which steps were sparse, and how far dense arms with different seeds lie apart."""
    notes = []
    sparse = next((result.trained for result in results if result.trained.sparse_steps), None)
    if sparse is not None:
        first, last, total = sparse.sparse_steps[0], sparse.sparse_steps[-1], len(sparse.losses)
        notes.append(
            f"step time and FLOPs are of a sparse step; steps {first + 1} to {last + 1} of {total} were sparse"
        )
    losses = [result.quality.loss for result in results if result.trained.arm.config is None]
    if len(losses) > 1:
        mean = statistics.mean(losses)
        notes.append(f"dense over {len(losses)} seeds: {mean:.4f}, from {min(losses):.4f} to {max(losses):.4f}")
    return notes


def save(results: Sequence[Result], run: dict[str, Any], out: Path) -> None:
    """Write `results.json`, `losses.csv` and `loss_curves.png`.

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
    _draw_losses(results, out / "loss_curves.png")


def _as_json(result: Result) -> dict[str, Any]:
    trained = result.trained
    return {
        "name": trained.arm.name,
        "options": None if trained.arm.config is None else trained.arm.config.to_options(),
        "seed": trained.arm.seed,
        "held_out_loss": result.quality.loss,
        "exact_match": result.quality.exact_match,
        "step_seconds": None if result.step_time is None else asdict(result.step_time),
        "flops_of_step": result.flops,
        "flops_of_dense_step": None if result.work is None else result.work.dense,
        "sparse_steps": len(trained.sparse_steps),
        "sparse_sites": result.sparse_sites,
        "sites": None if result.work is None else result.work.sites,
        "training": {
            "seconds": trained.seconds,
            "median_step_seconds": statistics.median(trained.step_seconds),
            "last_loss": trained.losses[-1],
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


def _draw_losses(results: Sequence[Result], path: Path) -> None:
    # Not through pyplot: it would look for a display.
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for result in results:
        losses = result.trained.losses
        steps = range(1, len(losses) + 1)
        (line,) = axes.plot(steps, _smoothed(losses), label=result.trained.arm.name)
        axes.plot(steps, losses, color=line.get_color(), alpha=0.2, linewidth=0.8)
    axes.set(xlabel="optimizer step", ylabel="training loss (nats per answer token)", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=150)


def _smoothed(values: Sequence[float]) -> list[float]:
    """Return the moving average, without a bias towards its start."""
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = SMOOTHING * total + value, SMOOTHING * weight + 1.0
        smoothed.append(total / weight)
    return smoothed
