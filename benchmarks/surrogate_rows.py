"""The rows of `surrogate_quality.py`: what tells runs apart, which were made already, and tables of them.

    python benchmarks/surrogate_rows.py [FILE]    # the tables of all rows of a file

Losses are compared with those of the dense arm, `exact`, of the same seed. The control is the arm `blind`: what it
loses is the gap, all that seeing the context in training is worth.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markdown import table
from rows import read_rows

RESULTS = Path(__file__).resolve().parent / "results" / "surrogate_quality.jsonl"
DENSE, CONTROL = "exact", "blind"
HEAD = (
    "arm",
    "judged by",
    "held-out loss by seed",
    "less dense, by seed",
    "mean",
    "deviation of dense over seeds",
    "of the control's gap",
    "step",
)


@dataclass(frozen=True)
class Settings:
    """What all arms have in common; part of every row, and of what tells whether a run is done already.

    A row that was written before a field was there has its default: defaults are what the program did without them.

    Attributes:
        model: name of the folder; with an `architecture`, the folder with the tokenizer.
        data: names of the files to learn from, with commas; as many records of each.
        targets: `"attention"` or `"all"`: the layers with adapters.
        steps: optimizer steps.
        batch_size: sequences of a step.
        longest: tokens; longer records are left out.
        records: the records to learn from are the first so many that fit.
        held_out: the first so many of the records of each held-out file that fit.
        lr: peak learning rate of AdamW; it rises over five steps and falls linearly to zero.
        rank: of the adapters; their scale is 2.
        eval_data: names of the files to judge by; by default the file `test` beside each of `data`.
        architecture: of a small model that is made and pre-trained on `data`; None takes the folder's weights.
        pretrain_steps: optimizer steps of the pre-training; zero without an `architecture`.
        context_share: context tokens of each record, as a share of its tokens, in training and in held-out data; None
            leaves records as they are. Where a record has less, other records of `data` stand in front of it, as a
            few-shot prompt; where it has more, the end of its question is labelled.
    """

    model: str
    data: str
    targets: str = "attention"
    steps: int = 300
    batch_size: int = 6
    longest: int = 240
    records: int = 4000
    held_out: int = 120
    lr: float = 5e-4
    rank: int = 16
    eval_data: str = ""
    architecture: str | None = None
    pretrain_steps: int = 0
    context_share: float | None = None

    def __post_init__(self) -> None:
        if not self.eval_data:
            object.__setattr__(self, "eval_data", _test_files(self.data))

    def __str__(self) -> str:
        """Return what a table of their rows is headed by: model, data and adapters, and all that is not the default."""
        plain = Settings(self.model, self.data, self.targets)
        given = dataclasses.asdict(self)
        others = [f"{name}={value}" for name, value in given.items() if value != getattr(plain, name)]
        return ", ".join([self.model, self.data.replace(",", " + "), f"adapters on {self.targets}", *others])


def _test_files(data: str) -> str:
    """Return the names of the files `test` beside the files to learn from."""
    files = [each.partition("/") for each in data.split(",")]
    return ",".join(f"{folder}/test{Path(name).suffix}" for folder, _, name in files)


def settings_of(row: Mapping[str, Any]) -> Settings:
    """Return the settings of a row, whenever it was written."""
    return Settings(**row["settings"])


def rows_with(settings: Settings, file: Path) -> list[dict[str, Any]]:
    """Return the rows of a file, which need not exist, that have these settings."""
    return [row for row in (read_rows([file]) if file.exists() else []) if settings_of(row) == settings]


def tables(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return a table of the rows of each settings, under a line that says which."""
    groups: dict[Settings, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(settings_of(row), []).append(row)
    return "\n\n".join(_titled(settings, group) for settings, group in groups.items())


def _titled(settings: Settings, rows: Sequence[Mapping[str, Any]]) -> str:
    seeds = ", ".join(str(seed) for seed in sorted({row["seed"] for row in rows}))
    return f"{settings}; seeds {seeds}\n\n{table(HEAD, cells(rows))}"


def cells(rows: Sequence[Mapping[str, Any]]) -> list[list[object]]:
    """Return the cells of a table of rows with the same settings: a line for each arm and each held-out file."""
    files = settings_of(rows[0]).eval_data.split(",")
    return [_line(rows, arm, file) for arm in dict.fromkeys(row["arm"] for row in rows) for file in files]


def _line(rows: Sequence[Mapping[str, Any]], arm: str, file: str) -> list[object]:
    losses = _losses(rows, arm, file)
    dense = _losses(rows, DENSE, file)
    gaps = _less(_losses(rows, CONTROL, file), dense)
    less = _less(losses, dense)
    both = less.keys() & gaps.keys()
    seeds = sorted({row["seed"] for row in rows})
    return [
        f"`{arm}`",
        file,
        ", ".join(f"{losses[seed]:.4f}" if seed in losses else "-" for seed in seeds),
        ", ".join(f"{less[seed]:+.4f}" if seed in less else "-" for seed in seeds),
        f"{statistics.fmean(less.values()):+.4f}" if less else "-",
        f"{statistics.stdev(dense.values()):.4f}" if len(dense) > 1 else "-",
        f"{sum(less[seed] for seed in both) / sum(gaps[seed] for seed in both):.0%}" if both else "-",
        f"{statistics.median(row['step_seconds'] for row in rows if row['arm'] == arm):.3f} s",
    ]


def _losses(rows: Sequence[Mapping[str, Any]], arm: str, file: str) -> dict[int, float]:
    """Return an arm's held-out losses by seed; a row that was written when there was one file has no name for it."""
    return {row["seed"]: row.get("losses", {file: row["loss"]})[file] for row in rows if row["arm"] == arm}


def _less(losses: Mapping[int, float], others: Mapping[int, float]) -> dict[int, float]:
    return {seed: losses[seed] - others[seed] for seed in losses if seed in others}


def main(argv: Sequence[str] | None = None) -> int:
    """Print tables; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=RESULTS, help="rows (default: %(default)s)")
    print(tables(read_rows([parser.parse_args(argv).file])))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
