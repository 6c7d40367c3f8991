"""Fine-tune a real model in several ways and compare held-out loss, seed by seed: what an approximation costs.

    python benchmarks/surrogate_quality.py --model DIR --data gsm8k/train.jsonl --eval-data gsm8k/test.jsonl
    python benchmarks/surrogate_quality.py ... --data e2e/train.txt --eval-data e2e/test.txt --arms exact,o2,auto,blind
    python benchmarks/surrogate_quality.py ... --arms exact,auto:end_step=0.85,exact:steps=0.4 --seeds 0,1,2
    python benchmarks/surrogate_quality.py ... --data a/train.txt,b/train.txt --eval-data a/test.txt,b/test.txt
    python benchmarks/surrogate_quality.py ... --architecture gpt_neox --cache DIR
    python benchmarks/surrogate_quality.py ... --context-share 0.9

An arm is a preset, with options behind a colon; `exact` is the dense one. The arm `blind` is the control: dense, but in
training no token sees the context. The option `steps` is the fraction of the steps that an arm takes, with a schedule
and a learning rate for so many. All arms of a seed have the same adapters at the start, and the same batches; the
held-out loss is computed by the eager model, densely, so that it is what a user of the adapter gets.

Each run appends a row to `benchmarks/results/surrogate_quality.jsonl`; one that stands there with the same settings is
not repeated. Data are JSON lines with `question` and `answer`, or lines `question||answer` of a `.txt` file.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import random
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from predictor_text import Example, load_encoder, pad
from rows import append_rows, environment
from surrogate_models import ARCHITECTURES, descend, load, pretrained, target_modules
from surrogate_rows import CONTROL, DENSE, RESULTS, Settings, rows_with, tables
from surrogate_text import context_share, hide_context, read_mixture, with_context_share
from torch import nn

from sparse_compile import Schedule, SparseLoRAConfig
from sparse_compile.calibration.losses import held_out_loss

EVALUATION_BATCH = 12


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.architecture and not args.cache:
        parser.error("--architecture needs --cache, the folder to keep what is pre-trained in")
    names = [_without_folders(each) for each in arguments]
    settings = _settings(args)
    task = functools.cache(lambda: Task(args.model, args.data, args.eval_data, settings, args.cache))
    for seed in args.seeds:
        for arm in args.arms:
            row = _known(args.out, settings, arm, seed)
            if row is None:
                row = {"settings": dataclasses.asdict(settings), "arm": arm, "seed": seed, **task().train(arm, seed)}
                append_rows([{**row, **environment("surrogate_quality.py", names)}], args.out)
            print(f"{settings.data} {arm} seed {seed}: {row['loss']:.4f}", flush=True)
    print(tables(rows_with(settings, args.out)))
    return 0


def _settings(args: argparse.Namespace) -> Settings:
    data, eval_data = (
        ",".join(f"{each.resolve().parent.name}/{each.name}" for each in files) for files in (args.data, args.eval_data)
    )
    pretrain_steps = args.pretrain_steps if args.architecture else 0
    return Settings(
        args.model.name,
        data,
        args.targets,
        args.steps,
        args.batch_size,
        lr=args.lr,
        eval_data=eval_data,
        architecture=args.architecture,
        pretrain_steps=pretrain_steps,
        context_share=args.context_share,
    )


def _without_folders(argument: str) -> str:
    """Return an argument with the names of files alone: rows say nothing of a machine's folders."""
    return re.sub(r"[^=,]*/", "", argument)


def _known(out: Path, settings: Settings, arm: str, seed: int) -> Mapping[str, Any] | None:
    """Return the row of a run that was made already."""
    return next((row for row in rows_with(settings, out) if (row["arm"], row["seed"]) == (arm, seed)), None)


@dataclass(frozen=True)
class Arm:
    """A way to train: `auto:end_step=0.85;dense_every=16`, `blind`, `exact:steps=0.4`.

    Attributes:
        options: of the backend.
        steps: fraction of the steps.
        blind: whether no token sees the context in training.
    """

    options: dict[str, Any]
    steps: float
    blind: bool

    @classmethod
    def parse(cls, text: str) -> Arm:
        """Read an arm.

        Raises:
            ValueError: an option that there is not, or a value that it does not take.
        """
        preset, _, listed = text.partition(":")
        given = (each.partition("=") for each in listed.split(";") if each)
        options = {name: ast.literal_eval(value) for name, _, value in given}
        steps = options.pop("steps", 1)
        if not isinstance(steps, int | float) or not 0 < steps <= 1:
            raise ValueError(f"steps={steps!r} is no fraction of the steps")
        options["preset"] = DENSE if preset == CONTROL else preset
        SparseLoRAConfig(**options)
        return cls(options, steps, preset == CONTROL)


class Task:
    """A model, what it learns from, and what it is judged by.

    Args:
        model: folder of the model, or of the tokenizer where the settings have an architecture.
        data: files to learn from.
        eval_data: files to judge by.
        settings: all else.
        cache: folder for models that are pre-trained here.
    """

    def __init__(
        self, model: Path, data: Sequence[Path], eval_data: Sequence[Path], settings: Settings, cache: Path | None
    ) -> None:
        self.settings = settings
        encode, config = load_encoder(model), transformers.AutoConfig.from_pretrained(model)
        longest = min(settings.longest, config.max_position_embeddings)
        examples = read_mixture(data, encode, config, settings.records, longest)
        if settings.architecture:
            assert cache is not None
            model = pretrained(settings.architecture, config, examples, settings.pretrain_steps, cache)
        self.base = load(model)
        change = functools.partial(self._with_share, shots=examples, longest=config.max_position_embeddings)
        self.examples = change(examples)
        held_out = (change(read_mixture([file], encode, config, settings.held_out, longest)) for file in eval_data)
        self.held_out = dict(zip(settings.eval_data.split(","), map(_held_out_batches, held_out), strict=True))

    def _with_share(self, examples: list[Example], shots: list[Example], longest: int) -> list[Example]:
        share = self.settings.context_share
        return examples if share is None else with_context_share(examples, share, shots, longest)

    def train(self, arm: str, seed: int) -> dict[str, Any]:
        """Train fresh adapters; return the held-out losses, the training loss at the end, and the median step.

        `loss` is the mean of `losses`, and `context` the share of context tokens.
        """
        settings, parsed = self.settings, Arm.parse(arm)
        steps = max(1, round(settings.steps * parsed.steps))
        torch.manual_seed(seed)
        targets = target_modules(self.base.config.model_type, settings.targets)
        lora = LoraConfig(r=settings.rank, lora_alpha=2 * settings.rank, target_modules=targets)
        model = get_peft_model(self.base, lora).train()
        options = {**parsed.options, "schedule": Schedule(steps)}
        call = torch.compile(model, backend="sparselora", dynamic=True, options=options)
        trained = [each for each in model.parameters() if each.requires_grad]
        try:
            padded = (lambda records: hide_context(pad(records))) if parsed.blind else pad
            train_losses, seconds = descend(call, trained, self._batches(steps, seed), padded, settings.lr)
            losses = self._losses(model)
        finally:
            self.base = model.unload()
            torch.compiler.reset()
        return {
            "loss": statistics.fmean(losses.values()),
            "losses": losses,
            "train_loss": statistics.fmean(train_losses[-20:]),
            "step_seconds": statistics.median(seconds[min(30, len(seconds) // 2) :]),
            "context": round(context_share(self.examples), 3),
        }

    def _batches(self, steps: int, seed: int) -> list[list[Example]]:
        """Return the records of each step: those of a seed are shuffled, and taken in turn."""
        size = self.settings.batch_size
        examples = list(self.examples)
        random.Random(1000 + seed).shuffle(examples)
        begins = (step * size % (len(examples) - size) for step in range(steps))
        return [examples[begin : begin + size] for begin in begins]

    @torch.no_grad()
    def _losses(self, model: nn.Module) -> dict[str, float]:
        """Return the mean loss of the held-out answer tokens of each file."""
        model.eval()
        return {name: held_out_loss(lambda batch: model(**batch), batches) for name, batches in self.held_out.items()}


def _held_out_batches(examples: Sequence[Example]) -> list[dict[str, Any]]:
    begins = range(0, len(examples), EVALUATION_BATCH)
    return [dict(vars(pad(examples[begin : begin + EVALUATION_BATCH]))) for begin in begins]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder of a model")
    add("--data", type=_files, required=True, help="files to learn from, as many records of each")
    add("--eval-data", type=_files, required=True, help="files to judge by, each by itself")
    add("--arms", type=_arms, default=["exact", "o1", "o2", "auto"], help="with commas")
    add("--seeds", type=lambda text: [int(each) for each in text.split(",")], default=[0, 1, 2])
    add("--targets", choices=("attention", "all"), default="attention", help="layers with adapters")
    add("--architecture", choices=ARCHITECTURES, help="pre-train a small model with the tokenizer of --model")
    add("--pretrain-steps", type=int, default=500, help="steps of its pre-training (default: %(default)s)")
    add("--cache", type=Path, help="where such models are kept")
    add("--context-share", type=_share, help="give each record this share of context tokens")
    add("--steps", type=int, default=Settings.steps)
    add("--batch-size", type=int, default=Settings.batch_size)
    add("--lr", type=float, default=Settings.lr)
    add("--out", type=Path, default=RESULTS, help="where rows are kept (default: %(default)s)")
    return parser


def _files(text: str) -> list[Path]:
    return [Path(each) for each in text.split(",")]


def _share(text: str) -> float:
    share = float(text)
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"{text} is no share between 0 and 1")
    return share


def _arms(text: str) -> list[str]:
    arms = text.split(",")
    for arm in arms:
        try:
            Arm.parse(arm)
        except (ValueError, SyntaxError) as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return arms


if __name__ == "__main__":
    raise SystemExit(main())
