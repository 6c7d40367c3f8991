"""Draw what was measured beside what the FLOPs allow.

    python benchmarks/plot.py benchmarks/results/*-mini.jsonl --out ratios.png
    python benchmarks/plot.py benchmarks/results/*-mini.jsonl --labels csr-mini --arms exact,o1 --out ratios.svg

For each workload, arm and dtype the newest row that was measured against Inductor is drawn: a bar for the ratio of step
times with its 20% and 80% quantiles, and a mark for the FLOP limit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from figures import save
from matplotlib.figure import Figure
from rows import read_rows


def newest_ratios(
    rows: Sequence[dict[str, Any]], labels: Sequence[str] = (), arms: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Return the newest row of each workload and arm that has a ratio to Inductor and a FLOP limit.

    Args:
        rows: what was measured.
        labels: the workloads that are wanted, by their labels; empty for all.
        arms: the arms that are wanted; empty for all.
    """
    newest = {
        (row["label"], row["arm"]): row
        for row in sorted(rows, key=lambda row: row["date"])
        if "inductor" in row["ratios"] and row["flops_limit"] is not None
        if (not labels or row["label"] in labels) and (not arms or row["arm"] in arms)
    }
    return [newest[key] for key in sorted(newest)]


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw rows, as `newest_ratios` returns them."""
    # Not through pyplot: it would look for a display.
    figure = Figure(figsize=(max(5, 2 + 1.4 * len(rows)), 4.5), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    ratios = [row["ratios"]["inductor"] for row in rows]
    medians = [ratio["median"] for ratio in ratios]
    below = [ratio["median"] - ratio["p20"] for ratio in ratios]
    above = [ratio["p80"] - ratio["median"] for ratio in ratios]
    bars = axes.bar(places, medians, 0.55, yerr=[below, above], capsize=4, color="#4c78a8", label="measured")
    axes.bar_label(bars, fmt="%.2fx", label_type="center", color="white")
    limits = [row["flops_limit"] for row in rows]
    axes.scatter(places, limits, marker="_", s=900, linewidths=2.5, color="#e45756", label="FLOP limit", zorder=3)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(places, ["\n".join([*row["label"].split(), row["arm"]]) for row in rows])
    axes.set(ylabel="speed of a step (PEFT + Inductor = 1)", title=rows[-1]["machine"]["cpu"])
    figure.legend(loc="outside lower center", ncols=2, markerscale=0.4)
    save(figure, path)


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the rows of the files given; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="+", help=".jsonl files that benchmarks/cpu.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="PNG or SVG to write")
    parser.add_argument("--labels", default="", help="comma list of workloads to draw, such as csr-mini; default: all")
    parser.add_argument("--arms", default="", help="comma list of arms to draw, such as exact,o2; default: all")
    args = parser.parse_args(argv)
    labels, arms = ([name for name in given.split(",") if name] for given in (args.labels, args.arms))
    rows = newest_ratios(read_rows(args.rows), labels, arms)
    if not rows:
        parser.error("no row of these has a ratio to Inductor and a FLOP limit")
    draw(rows, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
