"""Results as rows: what was measured, on what, with which versions; kept in JSON Lines files."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import Alone, Flops
from tabulate import tabulate
from workloads import Workload

from sparse_compile.cli.paired import Spread

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("sparse-compile", "torch", "transformers", "peft", "triton")


@dataclass(frozen=True)
class Row:
    """One arm on one workload. What was not measured is None.

    Attributes:
        workload: its sizes.
        label: its name, with every size that differs from the named workload's.
        arm: `"eager"`, `"inductor"`, or a preset of the `sparselora` backend.
        rounds: measured steps.
        step_seconds: duration of a step: forward, backward, optimizer.
        ratios: by peer, how many times faster than it a step is, paired within rounds.
        first_call_seconds: the first step, which compiles, with empty caches.
        first_loss: loss of the first step; all exact arms start alike.
        graphs: graphs that were compiled.
        flops: work of a step before and after the rewrites.
        flops_limit: the ratio of the two, which is the limit of the gain in time as far as time is products.
        flops_limit_weights: the same for products with frozen weights alone.
        efficiency: ratio to Inductor over `flops_limit`.
        alone: memory and first calls in processes of its own.
        counted: FLOPs of the dense step as `torch.utils.flop_counter` sees them.
        machine: processor, cores, threads, load average at the start.
        versions: of Python and the packages involved.
        commit: of this repository, and whether anything else was in the tree.
        date: of the start, in UTC.
        command: the command line.
    """

    workload: Workload
    label: str
    arm: str
    rounds: int
    step_seconds: Spread
    ratios: dict[str, Spread]
    first_call_seconds: float
    first_loss: float
    graphs: int
    flops: Flops | None
    flops_limit: float | None
    flops_limit_weights: float | None
    efficiency: float | None
    alone: Alone | None
    counted: dict[str, int]
    machine: dict[str, Any]
    versions: dict[str, str | None]
    commit: dict[str, Any]
    date: str
    command: str

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain data for JSON."""
        return dataclasses.asdict(self)


def append_rows(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Append rows, as plain data, to a JSON Lines file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def read_rows(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Read rows back as plain data, in the order in which they were written."""
    return [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines() if line]


def environment(program: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Return the fields of a row that say where it comes from: without them a duration says nothing."""
    return {
        "machine": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load": os.getloadavg()[0],
            "platform": platform.platform(),
        },
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([f"benchmarks/{program}", *arguments]),
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


def _commit() -> dict[str, Any]:
    """Return the commit that was measured; rows that earlier runs appended make no difference to it."""
    revision = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    return {"revision": revision, "dirty": None if changes is None else bool(changes)}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def table(rows: Sequence[Row]) -> str:
    """Lay rows out as a table with one line per arm."""
    cells = [("arm", "step", "20%..80%", *(f"vs {peer}" for peer in ("eager", "inductor")))]
    cells[0] += ("FLOP limit", "weights only", "efficiency", "sparse sites", "first call")
    cells[0] += ("peak memory", "of a step", "cold/warm")
    for row in rows:
        time, flops, alone = row.step_seconds, row.flops, row.alone
        cells.append(
            (
                row.arm,
                f"{time.median:.3f} s",
                f"{time.p20:.3f}..{time.p80:.3f}",
                *(_times(row.ratios[peer].median if peer in row.ratios else None) for peer in ("eager", "inductor")),
                _times(row.flops_limit),
                _times(row.flops_limit_weights),
                "-" if row.efficiency is None else f"{row.efficiency:.2f}",
                "-" if flops is None else f"{flops.sparse_sites}/{flops.sites}",
                f"{row.first_call_seconds:.1f} s",
                "-" if alone is None else f"{alone.peak_bytes / 2**20:.0f} MiB",
                "-" if alone is None else f"{alone.step_bytes / 2**20:.0f} MiB",
                "-" if alone is None else f"{alone.first_call_cold:.1f}/{alone.first_call_warm:.1f} s",
            )
        )
    alignment = ["right"] * len(cells[0])
    return tabulate(cells[1:], cells[0], tablefmt="plain", disable_numparse=True, colalign=alignment)


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"
