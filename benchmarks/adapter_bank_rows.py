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
    """Return the held-out losses by arm and by task, the curves, and what large banks take."""
    makers = {"leave-one-out": (_by_arm, _by_task), "sweep": (_sweep,), "curve": (_curves,), "scale": (_scale,)}
    parts = []
    for kind, each in makers.items():
        found = [row for row in rows if row["kind"] == kind]
        parts += [make(found) for make in each if found]
    return "\n\n".join(parts)


def _by_arm(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of the arms that all rows have, and one of all arms over the rows that have them all."""
    arms = dict.fromkeys(arm for row in rows for arm in row["losses"])
    in_all = [arm for arm in arms if all(arm in row["losses"] for row in rows)]
    with_all = [row for row in rows if len(row["losses"]) == len(arms)]
    parts = [_compared(rows, in_all)]
    if len(in_all) < len(arms) and with_all:
        parts.append(_compared(with_all, list(arms)))
    return "\n\n".join(parts)


def _compared(rows: Sequence[Mapping[str, Any]], arms: Sequence[str]) -> str:
    seeds = sorted({row["seed"] for row in rows})
    lines = []
    for arm in arms:
        by_seed = [_mean(row["losses"][arm] for row in rows if row["seed"] == seed) for seed in seeds]
        won = _mean(float(row["losses"][arm] < row["losses"]["uniform"]) for row in rows)
        closed = _mean(_gap(row["losses"], arm) for row in rows)
        lines.append(
            (arm, *(f"{each:.3f}" for each in by_seed), f"{_mean(by_seed):.3f}", f"{closed:.0%}", f"{won:.0%}")
        )
    lines.sort(key=lambda line: float(line[-3]))
    head = (
        "arm",
        *(f"seed {seed}" for seed in seeds),
        "mean",
        "of the gap from base to trained",
        "better than uniform",
    )
    return table(head, lines)


def _gap(losses: Mapping[str, float], arm: str) -> float:
    return (losses["base"] - losses[arm]) / (losses["base"] - losses["trained"])


def _by_task(rows: Sequence[Mapping[str, Any]]) -> str:
    shown = ("base", "uniform", "nearest", "apart", "standardised/jensen_shannon", "mlp/jensen_shannon", "trained")
    arms = [arm for arm in shown if all(arm in row["losses"] for row in rows)]
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


def _sweep(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the mean losses by rank and by temperature over the same tasks."""
    parts = []
    for kind, name in (("ranks", "rank"), ("temperatures", "temperature")):
        values = [*rows[0][kind]]
        parts.append(
            table((name, *values), [("held-out loss", *(f"{_mean(row[kind][v] for row in rows):.3f}" for v in values))])
        )
    return "\n\n".join(parts)


def _scale(rows: Sequence[Mapping[str, Any]]) -> str:
    sizes, taken = ("adapters", "rank", "blocks"), ("cpu_seconds", "mb")
    names = (*sizes, *(f"{part}_{each}" for part in ("weigh", "compose") for each in taken), "model_cpu_minutes")
    lines = [tuple(f"{row[name]:.1f}" if isinstance(row[name], float) else row[name] for name in names) for row in rows]
    return table([name.replace("_", " ") for name in names], lines)


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)
