"""Compare ways to fine-tune a pruned model: plain LoRA, masks by autograd, and LoRS (`preserve_weight_mask`).

    python benchmarks/lors.py --model DIR --data train.jsonl --eval-data test.jsonl --out docs/lors.md
    python benchmarks/lors.py --speed --out docs/lors.md

The first gives held-out losses, the second time and memory of a step. Each run of the first appends a row to
`benchmarks/results/lors.jsonl`; a run that stands there already, with the same settings, is not repeated, so that an
interrupted table goes on where it was. With `--out` the tables are written into that file, between marker lines;
otherwise they are printed. What the arms are is said in `lors_quality.py` and `lors_speed.py`. Runs on the CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lors_quality
import lors_speed
import torch
from lors_models import CRITERIA, PATTERNS, TARGETS
from lors_quality import Pruned, Settings, Task
from markdown import replace_tables, table
from rows import append_rows, environment, read_rows
from workloads import WORKLOADS

RESULTS = Path(__file__).resolve().parent / "results" / "lors.jsonl"
PRUNINGS = tuple(f"{criterion} {pattern}" for criterion, pattern in itertools.product(CRITERIA, PATTERNS))
STEP = dataclasses.replace(WORKLOADS["math10k-mini"], layers=2, vocab=4096, targets=TARGETS)
"""The step that `--speed` measures: blocks as wide as those of `math10k-mini`, with little around them."""

SIZES = ("layers", "hidden", "ffn", "heads", "kv_heads", "vocab", "batch")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    arguments = sys.argv[1:] if argv is None else list(argv)
    known = lors_speed.ARMS if args.speed else lors_quality.ARMS
    args.arms = args.arms or list(known)
    unknown = (set(args.arms) - set(known)) | (set(args.prunings) - set(PRUNINGS))
    if unknown:
        parser.error(f"no {', '.join(sorted(unknown))}; there are {', '.join((*known, *PRUNINGS))}")
    if args.speed:
        if args.processor_time and torch.get_num_threads() > 1:
            parser.error("--processor-time adds up what all threads take: set OMP_NUM_THREADS=1")
        name, text = "the step", _speed(args, arguments)
    else:
        if not (args.model and args.data and args.eval_data):
            parser.error("give --speed, or --model, --data and --eval-data")
        name, text = args.model.name, _quality(args, arguments)
    if args.out is None:
        print(text)
    else:
        replace_tables(args.out, name, text)
    return 0


def _speed(args: argparse.Namespace, arguments: Sequence[str]) -> str:
    workload = dataclasses.replace(STEP, **{size: getattr(args, size) for size in SIZES})
    clock = time.process_time if args.processor_time else time.perf_counter
    measured = lors_speed.measure(workload, args.pattern, args.arms, args.rounds, args.warm_up, clock, arguments)
    rows = lors_speed.plain(measured)
    append_rows(rows, args.results)
    about = (
        f"`{workload.label}`, pruned by magnitude to {args.pattern}; fp32, medians of {args.rounds} rounds taken in "
        f"turns{', in processor time' if args.processor_time else ''}, {_where(rows[0])}."
    )
    return f"{about}\n\n{table(lors_speed.HEAD, lors_speed.table(rows))}"


def _where(row: Mapping[str, Any]) -> str:
    machine, versions = row["machine"], row["versions"]
    return f"{machine['threads']} thread(s) of {machine['cpu']}, load {machine['load']:.1f}, torch {versions['torch']}"


def _quality(args: argparse.Namespace, arguments: Sequence[str]) -> str:
    settings = Settings(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)})
    wanted = {"kind": "quality", "model": args.model.name, "settings": dataclasses.asdict(settings)}

    def done() -> list[dict[str, Any]]:
        rows = read_rows([args.results]) if args.results.exists() else []
        return [row for row in rows if wanted.items() <= row.items()]

    keys = {_key(row) for row in done()}
    todo = [key for key in _runs(args) if key not in keys]
    if todo:
        task = Task(args.model, args.data, args.eval_data, settings)
        pruned: dict[tuple[str, str], Pruned] = {}
        for criterion, pattern, arm, seed in todo:
            place = {"criterion": criterion, "pattern": pattern, "arm": arm, "seed": seed}
            surroundings = environment("lors.py", arguments)
            if criterion == "none":
                measured = lors_quality.Measured(task.loss(task.dense), None, 0, 0)
            else:
                if (criterion, pattern) not in pruned:
                    pruned[criterion, pattern] = Pruned(task, criterion, pattern)
                model = pruned[criterion, pattern]
                measured = model.frozen() if arm == "frozen" else model.train(arm, seed)
            append_rows([{**wanted, **place, **dataclasses.asdict(measured), **surroundings}], args.results)
            print(f"{criterion} {pattern} {arm} seed {seed}: {measured.loss:.4f}, {measured.seconds:.0f} s", flush=True)
    rows = [row for row in done() if _key(row) in set(_runs(args))]
    return f"{_about(settings, args, rows)}\n\n{table(lors_quality.HEAD, lors_quality.table(rows))}"


def _key(row: Mapping[str, Any]) -> tuple[str, str, str, int]:
    return row["criterion"], row["pattern"], row["arm"], row["seed"]


def _runs(args: argparse.Namespace) -> Iterator[tuple[str, str, str, int]]:
    """Yield criterion, pattern, arm and seed of each run, in an order in which whatever is done can be compared."""
    yield "none", "none", "frozen", 0
    prunings = [pruning.split() for pruning in args.prunings]
    for criterion, pattern in prunings:
        yield criterion, pattern, "frozen", 0
    for seed in args.seeds:
        for (criterion, pattern), arm in itertools.product(prunings, args.arms):
            yield criterion, pattern, arm, seed


def _about(settings: Settings, args: argparse.Namespace, rows: Sequence[Mapping[str, Any]]) -> str:
    return (
        f"{settings.steps} steps of {settings.batch_size} records of `{args.data.parent.name}/{args.data.name}` (the "
        f"first {settings.records} of at most {settings.length} tokens), AdamW, learning rate {settings.lr:g} falling "
        f"to zero, LoRA of rank {settings.rank} and alpha {settings.alpha:g} on all linear layers of the blocks, which "
        f"are what is pruned; loss in nats a token of the answers of the first {settings.held_out} such records of "
        f"`{args.eval_data.parent.name}/{args.eval_data.name}`, of the merged model. Wanda and `lors-start` read "
        f"{settings.calibration} records. fp32, torch {rows[0]['versions']['torch']}."
    )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of rows to append to and to go on from")
    parser.add_argument("--out", type=Path, help="Markdown file whose tables are replaced")
    parser.add_argument("--arms", type=_names, help="default: all of the part that runs")

    quality = parser.add_argument_group("held-out loss")
    quality.add_argument("--model", type=Path, help="folder of a Llama-like model and its tokenizer")
    quality.add_argument("--data", type=Path, help="JSON lines with question and answer, to learn from")
    quality.add_argument("--eval-data", type=Path, help="the same, held out")
    quality.add_argument("--prunings", type=_names, default=list(PRUNINGS), help=f"default: {','.join(PRUNINGS)}")
    quality.add_argument(
        "--seeds", type=lambda text: [int(seed) for seed in _names(text)], default=[0, 1, 2], help="default: 0,1,2"
    )
    for field in dataclasses.fields(Settings):
        kind = float if isinstance(field.default, float) else _positive
        option = f"--{field.name.replace('_', '-')}"
        quality.add_argument(option, type=kind, default=field.default, help="default: %(default)s")

    speed = parser.add_argument_group("time and memory of a step")
    speed.add_argument("--speed", action="store_true", help="measure this instead")
    speed.add_argument("--pattern", choices=PATTERNS, default="2:4", help="of the pruned weights (default: 2:4)")
    speed.add_argument("--rounds", type=_positive, default=7, help="measured rounds (default: 7)")
    speed.add_argument("--warm-up", type=int, default=1, help="rounds before them (default: 1)")
    speed.add_argument(
        "--processor-time", action="store_true", help="of one thread, instead of the clock's: for a busy machine"
    )
    for size in SIZES:
        speed.add_argument(f"--{size.replace('_', '-')}", type=_positive, default=getattr(STEP, size), metavar="N")
    return parser


if __name__ == "__main__":
    sys.exit(main())
