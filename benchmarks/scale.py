"""Measure where sparsity pays: step time over sparsity, share of context, sequence length and width.

    python benchmarks/scale.py                              # all curves, about 15 minutes on two cores
    python benchmarks/scale.py --curves length,width
    python benchmarks/scale.py --curves sparsity --only 0.5,0.9
    python benchmarks/scale.py --draw benchmarks/results/scale.jsonl --out scale.png

Each point is a LoRA step of a small Llama (4 blocks, the middle two sparse): PEFT + Inductor, this backend with
the exact passes, and with sparsity as well, in turns; ratios are taken within a round. Sites are named in the options,
so that they are sparse whether it pays or not; what the cost model says of them, by which a preset would leave them
dense, is part of the row.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from figures import save
from measure import arm_model, interleaved
from rows import append_rows, environment, read_rows
from workloads import WORKLOADS, Workload, adapted_model, base_model, make_batch

import sparse_compile
from sparse_compile.cli.paired import Spread, paired_ratio, spread, training_step

RESULTS = Path(__file__).resolve().parent / "results" / "scale.jsonl"
LAYERS = 4
BASE = dataclasses.replace(WORKLOADS["math10k-mini"], layers=LAYERS, vocab=4096)
SPARSITY = {"mlp": 0.99, "self_attn": 0.75}
"""Of the sparse blocks, where a curve does not vary it: that of the preset `o2`."""


@dataclass(frozen=True)
class Point:
    """One place on a curve.

    Attributes:
        curve: a name of `CURVES`.
        x: the value that the curve varies.
        workload: sizes of the step.
        sparsity: by kind of site, the last part of its name.
    """

    curve: str
    x: float
    workload: Workload
    sparsity: Mapping[str, float]

    @property
    def options(self) -> dict[str, Any]:
        """The options of the sparse arm: sites are named, and the exact passes run as well."""
        sites = {f"layers.{layer}.{kind}": s for layer in range(1, LAYERS - 1) for kind, s in self.sparsity.items()}
        return {"preset": "exact", "layer_sparsity": sites, "start_step": 0}


def _over_sparsity() -> Iterator[Point]:
    for sparsity in (0.25, 0.5, 0.75, 0.9, 0.97, 0.99):
        yield Point("sparsity", sparsity, BASE, dict.fromkeys(SPARSITY, sparsity))


def _over_context() -> Iterator[Point]:
    for share in (0.0, 0.25, 0.5, 0.75, 0.9, 1.0):
        # A batch without any label has no loss: one token is left.
        output = max(1, round(BASE.length * (1 - share)))
        yield Point("context", share, dataclasses.replace(BASE, output=output), SPARSITY)


def _over_length() -> Iterator[Point]:
    for length in (128, 256, 512, 1024, 2048):
        sizes = {"length": length, "output": length // 4, "batch": max(1, 1024 // length)}
        yield Point("length", length, dataclasses.replace(BASE, **sizes), SPARSITY)


def _over_width() -> Iterator[Point]:
    for hidden in (256, 512, 1024, 2048):
        sizes = {"hidden": hidden, "ffn": hidden * 7 // 2, "heads": hidden // 64, "kv_heads": hidden // 256}
        yield Point("width", hidden, dataclasses.replace(BASE, **sizes), SPARSITY)


CURVES = {"sparsity": _over_sparsity, "context": _over_context, "length": _over_length, "width": _over_width}
LABELS = {
    "sparsity": "sparsity of the middle blocks",
    "context": "share of context tokens",
    "length": "tokens of a sequence",
    "width": "width of the model",
}


@dataclass(frozen=True)
class Measured:
    """What one point took.

    Attributes:
        seconds: by arm (`inductor`, `exact`, `sparse`), duration of a step.
        exact: how many times faster than Inductor the step with the exact passes is.
        sparse: the same of the sparse step.
        gain: how many times faster than the step with the exact passes the sparse one is.
        notes: by site, why the cost model would leave it dense; empty where it would not.
    """

    seconds: dict[str, Spread]
    exact: Spread
    sparse: Spread
    gain: Spread
    notes: dict[str, str]


def measure(point: Point, rounds: int, caches: Path) -> Measured:
    """Measure the arms of one point in turns.

    Args:
        point: what is measured.
        rounds: measured rounds.
        caches: folder of the compile caches; points that share it compile what they have in common once.
    """
    torch.compiler.reset()
    base, batch = base_model(point.workload), make_batch(point.workload)
    models = {arm: arm_model(base, point.workload, arm) for arm in ("inductor", "exact")}
    models["sparse"] = adapted_model(base, point.workload)
    models["sparse"].compile(backend="sparselora", options=point.options)
    steps = {arm: training_step(model, batch) for arm, model in models.items()}
    taken = {arm: times.steps for arm, times in interleaved(steps, caches, rounds, warm_up=1).items()}
    report = sparse_compile.explain(adapted_model(base, point.workload), config=point.options, **batch)
    return Measured(
        seconds={arm: spread(each) for arm, each in taken.items()},
        exact=paired_ratio(taken["inductor"], taken["exact"]),
        sparse=paired_ratio(taken["inductor"], taken["sparse"]),
        gain=paired_ratio(taken["exact"], taken["sparse"]),
        notes={site.name: site.reason for site in report.sites if site.sparsity and site.reason},
    )


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the newest row of each point a panel for each curve."""
    from matplotlib.figure import Figure

    newest = {(row["curve"], row["x"]): row for row in sorted(rows, key=lambda row: row["date"])}
    curves = [curve for curve in CURVES if any(key[0] == curve for key in newest)]
    figure = Figure(figsize=(4 * len(curves), 3.8), layout="constrained")
    for axes, curve in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
        found = [newest[key] for key in sorted(newest) if key[0] == curve]
        places = [row["x"] for row in found]
        for arm, colour in (("exact", "#4c78a8"), ("sparse", "#e45756")):
            axes.plot(places, [row[arm]["median"] for row in found], "o-", color=colour, label=arm)
        unpaid = [row for row in found if row["notes"]]
        axes.scatter(
            [row["x"] for row in unpaid], [row["sparse"]["median"] for row in unpaid], s=120, facecolors="none",
            edgecolors="black", label="the cost model declines a site",
        )  # fmt: skip
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set(xlabel=LABELS[curve], ylabel="speed of a step (PEFT + Inductor = 1)")
        if curve in ("length", "width"):
            axes.set_xscale("log", base=2)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    save(figure, path)


def _numbers(text: str) -> set[float]:
    return {float(number) for number in text.split(",")}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, or draw what was measured; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", default=",".join(CURVES), help=f"comma list of {', '.join(CURVES)}")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds of a point")
    parser.add_argument(
        "--only", type=_numbers, help="comma list of the points to measure, such as 0.5,0.9; default: all"
    )
    parser.add_argument("--draw", type=Path, help="draw the rows of this file instead of measuring")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of rows to append to, or PNG or SVG to draw")
    args = parser.parse_args(argv)
    if args.draw:
        draw(read_rows([args.draw]), args.out)
        return 0
    chosen = args.curves.split(",")
    if not set(chosen) <= set(CURVES):
        parser.error(f"no curve {', '.join(sorted(set(chosen) - set(CURVES)))}; there are {', '.join(CURVES)}")
    with tempfile.TemporaryDirectory() as caches:
        for point in (point for curve in chosen for point in CURVES[curve]()):
            if args.only is None or point.x in args.only:
                _append(point, measure(point, args.rounds, Path(caches)), args.out)
    return 0


def _append(point: Point, measured: Measured, out: Path) -> None:
    """Append a row and print a line of it."""
    place = {"curve": point.curve, "x": point.x, "label": point.workload.label, "sparsity": dict(point.sparsity)}
    append_rows([place | dataclasses.asdict(measured) | environment("scale.py", sys.argv[1:])], out)
    print(
        f"{point.curve} {point.x:g}: exact {measured.exact.median:.2f}x, sparse {measured.sparse.median:.2f}x"
        + (f"; the cost model declines {', '.join(measured.notes)}" if measured.notes else ""),
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
