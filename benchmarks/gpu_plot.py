"""Draw what `gpu.py` measured: each kernel against its floor, and the steps against PEFT in eager mode.

python benchmarks/gpu_plot.py benchmarks/results/gpu.jsonl --out gpu.svg
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from figures import save
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rows import read_rows

COLOURS = {"reference": "#4c78a8", "triton": "#e45756"}
NAMES = {"reference": "index_select and cuBLAS", "triton": "generated"}


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the newest row of each kernel and of each arm, a row of two panels for each workload.

    Raises:
        ValueError: there is nothing to draw.
    """
    kernels: dict[str, dict[str, dict[str, Any]]] = {}
    steps: dict[str, dict[str, dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["date"]):
        if "kernel" in row:
            kernels.setdefault(row["workload"], {})[row["kernel"]] = row
        elif "eager" in row.get("ratios", {}):
            steps.setdefault(row["workload"]["name"], {})[row["arm"]] = row
    workloads = list(dict.fromkeys([*kernels, *steps]))
    if not workloads:
        raise ValueError("no row of a kernel, or of a step beside PEFT in eager mode")
    figure = Figure(figsize=(12, 4 * len(workloads)), layout="constrained")
    for workload, (left, right) in zip(workloads, figure.subplots(len(workloads), 2, squeeze=False), strict=True):
        _draw_kernels(left, list(kernels.get(workload, {}).values()))
        _draw_steps(right, list(steps.get(workload, {}).values()))
        left.set_title(workload)
    figure.suptitle(next(row["machine"].get("gpu", "") for row in reversed(rows)))
    save(figure, path)


def _draw_kernels(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    places = range(len(rows))
    for offset, provider in ((-0.2, "reference"), (0.2, "triton")):
        times = [1e6 * row[provider]["seconds"] for row in rows]
        axes.barh([at + offset for at in places], times, 0.38, color=COLOURS[provider], label=NAMES[provider])
    floors = [1e6 * row["floor"] for row in rows]
    axes.scatter(floors, places, marker="|", s=500, linewidths=2, color="black", label="floor", zorder=3)
    axes.set_yticks(places, [row["kernel"] for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="microseconds")
    axes.legend()


def _draw_steps(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    ratios = [row["ratios"]["eager"] for row in rows]
    medians = [ratio["median"] for ratio in ratios]
    spreads = [[r["median"] - r["p20"] for r in ratios], [r["p80"] - r["median"] for r in ratios]]
    bars = axes.barh(range(len(rows)), medians, 0.6, xerr=spreads, capsize=3, color=COLOURS["reference"])
    axes.bar_label(bars, fmt="%.2fx", label_type="center", color="white")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row["arm"] for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="speed of a step (PEFT eager = 1)")


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the rows of the files given; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="+", help=".jsonl files that benchmarks/gpu.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="PNG or SVG to write")
    args = parser.parse_args(argv)
    try:
        draw(read_rows(args.rows), args.out)
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
