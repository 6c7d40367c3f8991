"""Fine-tune a real model in several ways and compare held-out loss, seed by seed: what an approximation costs.

    python benchmarks/surrogate_quality.py --model DIR --data gsm8k/train.jsonl --eval-data gsm8k/test.jsonl
    python benchmarks/surrogate_quality.py ... --data e2e/train.txt --eval-data e2e/test.txt --arms exact,o2,auto
    python benchmarks/surrogate_quality.py ... --arms exact,auto,auto:end_step=0.85,auto:dense_every=16 --seeds 0,1,2

An arm is a preset, with options behind a colon. All arms of a seed have the same adapters at the start, and the same
batches; the held-out loss is computed by the eager model, densely, so that it is what a user of the adapter gets.
Each run appends a row to `benchmarks/results/surrogate_quality.jsonl`; one that stands there with the same settings is
not repeated. Data are JSON lines with `question` and `answer`, or lines `question||answer` of a `.txt` file.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from markdown import table
from peft import LoraConfig, get_peft_model
from predictor_text import load_encoder, pad, read_examples
from rows import append_rows, environment, read_rows
from torch import nn

from sparse_compile import Schedule, SparseLoRAConfig
from sparse_compile.calibration.losses import held_out_loss

RESULTS = Path(__file__).resolve().parent / "results" / "surrogate_quality.jsonl"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
EVALUATION_BATCH = 12


@dataclass(frozen=True)
class Settings:
    """What all arms have in common; part of every row, and of what tells whether a run is done already.

    Attributes:
        model: name of the folder.
        data: name of the file to learn from.
        targets: `"attention"` or `"all"`: the layers with adapters.
        steps: optimizer steps.
        batch_size: sequences of a step.
        longest: tokens; longer records are left out.
        records: the records to learn from are the first so many that fit.
        held_out: the first so many of the held-out records that fit.
        lr: peak learning rate of AdamW; it rises over five steps and falls linearly to zero.
        rank: of the adapters; their scale is 2.
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    args = _parser().parse_args(argv)
    data = f"{args.data.resolve().parent.name}/{args.data.name}"
    settings = Settings(args.model.name, data, args.targets, args.steps, args.batch_size, lr=args.lr)
    task = Task(args.model, args.data, args.eval_data, settings)
    rows = []
    for seed in args.seeds:
        for arm in args.arms:
            rows.append(_known(args.out, settings, arm, seed) or _measured(task, arm, seed, args.out, argv))
            print(f"{settings.data} {arm} seed {seed}: {rows[-1]['loss']:.4f}", flush=True)
    print(table(HEAD, cells(rows)))
    return 0


def options_of(arm: str) -> dict[str, Any]:
    """Return the options of an arm: `auto:end_step=0.85;dense_every=16`.

    Raises:
        ValueError: an option that there is not, or a value that it does not take.
    """
    preset, _, listed = arm.partition(":")
    given = (each.partition("=") for each in listed.split(";") if each)
    options = {"preset": preset, **{name: ast.literal_eval(value) for name, _, value in given}}
    SparseLoRAConfig(**options)
    return options


class Task:
    """A model, what it learns from, and what it is judged by."""

    def __init__(self, model: Path, data: Path, eval_data: Path, settings: Settings) -> None:
        self.settings = settings
        self.base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.base.config.use_cache = False
        encode, config = load_encoder(model), self.base.config
        longest = min(settings.longest, config.max_position_embeddings)
        self.examples = read_examples(data, encode, config, settings.records, longest)
        held_out = read_examples(eval_data, encode, config, settings.held_out, longest)
        self.held_out = [
            dict(vars(pad(held_out[i : i + EVALUATION_BATCH]))) for i in range(0, len(held_out), EVALUATION_BATCH)
        ]

    def train(self, arm: str, seed: int) -> dict[str, Any]:
        """Train fresh adapters; return the held-out loss, the training loss at the end, and the median step."""
        settings = self.settings
        torch.manual_seed(seed)
        targets = list(ATTENTION if settings.targets == "attention" else ALL)
        lora = LoraConfig(r=settings.rank, lora_alpha=2 * settings.rank, target_modules=targets)
        model = get_peft_model(self.base, lora).train()
        options = {**options_of(arm), "schedule": Schedule(settings.steps)}
        call = torch.compile(model, backend="sparselora", dynamic=True, options=options)
        try:
            losses, seconds = self._steps(model, call, seed)
            loss = self._loss(model)
        finally:
            self.base = model.unload()
            torch.compiler.reset()
        last = losses[-min(20, len(losses)) :]
        warm = seconds[min(30, len(seconds) // 2) :]
        return {"loss": loss, "train_loss": statistics.fmean(last), "step_seconds": statistics.median(warm)}

    def _steps(self, model: nn.Module, call: Any, seed: int) -> tuple[list[float], list[float]]:
        settings = self.settings
        examples = list(self.examples)
        random.Random(1000 + seed).shuffle(examples)
        trained = [each for each in model.parameters() if each.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=0.0)
        losses, seconds = [], []
        for step in range(settings.steps):
            begin = step * settings.batch_size % (len(examples) - settings.batch_size)
            batch = vars(pad(examples[begin : begin + settings.batch_size]))
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * min(1, (step + 1) / 5) * (1 - step / settings.steps)
            start = time.perf_counter()
            loss = call(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            seconds.append(time.perf_counter() - start)
        return losses, seconds

    @torch.no_grad()
    def _loss(self, model: nn.Module) -> float:
        """Return the mean loss of held-out answer tokens."""
        model.eval()
        return held_out_loss(lambda batch: model(**batch), self.held_out)


def _known(out: Path, settings: Settings, arm: str, seed: int) -> Mapping[str, Any] | None:
    """Return the row of a run that was made already."""
    rows = read_rows([out]) if out.exists() else []
    wanted = {"settings": dataclasses.asdict(settings), "arm": arm, "seed": seed}
    return next((row for row in rows if wanted.items() <= row.items()), None)


def _measured(task: Task, arm: str, seed: int, out: Path, argv: Sequence[str] | None) -> Mapping[str, Any]:
    arguments = sys.argv[1:] if argv is None else argv
    row = {
        "settings": dataclasses.asdict(task.settings),
        "arm": arm,
        "seed": seed,
        **task.train(arm, seed),
        **environment("surrogate_quality.py", [Path(each).name if "/" in each else each for each in arguments]),
    }
    append_rows([row], out)
    return row


HEAD = ("data", "adapters", "arm", "held-out loss by seed", "less the first arm's, by seed", "mean")


def cells(rows: Sequence[Mapping[str, Any]]) -> list[list[object]]:
    """Return the cells of a table: a line for each arm, its losses paired by seed with those of the first arm."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    losses = {(row["arm"], row["seed"]): row["loss"] for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    lines: list[list[object]] = []
    for arm in arms:
        found = [losses[arm, seed] for seed in seeds]
        less = [losses[arm, seed] - losses[arms[0], seed] for seed in seeds]
        settings = rows[0]["settings"]
        lines.append(
            [
                settings["data"],
                settings["targets"],
                f"`{arm}`",
                ", ".join(f"{each:.4f}" for each in found),
                ", ".join(f"{each:+.4f}" for each in less),
                f"{statistics.fmean(less):+.4f}",
            ]
        )
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a model")
    parser.add_argument("--data", type=Path, required=True, help="file to learn from")
    parser.add_argument("--eval-data", type=Path, required=True, help="file to judge by")
    parser.add_argument("--arms", type=_arms, default=["exact", "o1", "o2", "auto"], help="the first is compared with")
    parser.add_argument("--seeds", type=lambda text: [int(each) for each in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--targets", choices=("attention", "all"), default="attention", help="layers with adapters")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--batch-size", type=int, default=Settings.batch_size)
    parser.add_argument("--lr", type=float, default=Settings.lr)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where rows are kept (default: %(default)s)")
    return parser


def _arms(text: str) -> list[str]:
    arms = text.split(",")
    for arm in arms:
        try:
            options_of(arm)
        except (ValueError, SyntaxError) as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return arms


if __name__ == "__main__":
    raise SystemExit(main())
