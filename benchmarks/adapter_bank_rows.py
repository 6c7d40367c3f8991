"""The rows of `adapter_bank.py`, as tables."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markdown import table
from rows import read_rows

RESULTS = Path(__file__).resolve().parent / "results" / "adapter_bank.jsonl"


def rows_of(out: Path) -> list[dict[str, Any]]:
    """Return the rows of a file that may not be there yet."""
    return read_rows([out]) if out.exists() else []


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the held-out losses by arm and by task, and the curves."""
    left_out = [row for row in rows if row["kind"] == "leave-one-out"]
    curves = [row for row in rows if row["kind"] == "curve"]
    parts = [_by_arm(left_out), _by_task(left_out)] if left_out else []
    return "\n\n".join([*parts, *([_curves(curves)] if curves else [])])


def _by_arm(rows: Sequence[Mapping[str, Any]]) -> str:
    seeds = sorted({row["seed"] for row in rows})
    lines = []
    for arm in rows[0]["losses"]:
        by_seed = [_mean(row["losses"][arm] for row in rows if row["seed"] == seed) for seed in seeds]
        won = _mean(float(row["losses"][arm] < row["losses"]["uniform"]) for row in rows)
        gaps = [_gap(row["losses"], arm) for row in rows]
        lines.append(
            (arm, *(f"{each:.3f}" for each in by_seed), f"{_mean(by_seed):.3f}", f"{_mean(gaps):.0%}", f"{won:.0%}")
        )
    first, last = lines[:2], sorted(lines[2:], key=lambda line: line[-3])
    head = (
        "arm",
        *(f"seed {seed}" for seed in seeds),
        "mean",
        "of the gap from base to trained",
        "better than uniform",
    )
    return table(head, [*first, *last])


def _gap(losses: Mapping[str, float], arm: str) -> float:
    return (losses["base"] - losses[arm]) / (losses["base"] - losses["trained"])


def _by_task(rows: Sequence[Mapping[str, Any]]) -> str:
    arms = ("base", "uniform", "nearest", "apart", "standardised/jensen_shannon", "mlp/jensen_shannon", "trained")
    by_task: dict[str, list[Mapping[str, float]]] = defaultdict(list)
    for row in rows:
        by_task[row["task"]].append(row["losses"])
    lines = [
        (task, *(f"{_mean(each[arm] for each in losses):.3f}" for arm in arms))
        for task, losses in sorted(by_task.items())
    ]
    return table(("left out", *arms), lines)


def _curves(rows: Sequence[Mapping[str, Any]]) -> str:
    by_start: dict[tuple[str, str], list[Mapping[str, float]]] = defaultdict(list)
    for row in rows:
        for start in ("cold", "composed"):
            by_start[row["task"], start].append(row[start])
    steps = [*rows[0]["cold"]]
    lines = [
        (f"{task}, {start}", *(f"{_mean(each[step] for each in found):.3f}" for step in steps))
        for (task, start), found in by_start.items()
    ]
    return table(("held-out loss after steps", *steps), lines)


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)
