"""Compose adapters for tasks that a bank has not seen, and compare held-out loss with training and with plain averages.

    python benchmarks/adapter_bank.py --model DIR --e2e e2e/train.txt,e2e/test.txt \\
        --gsm8k gsm8k/train.jsonl,gsm8k/test.jsonl --cache DIR [--seeds 0,1] [--curves e2e-pub-words,gsm8k-add]
    python benchmarks/adapter_bank.py --table    # the tables of the rows that are there

One adapter is trained for each of 14 tasks (`adapter_bank_tasks.py`) and put into a bank. Then each task is left out in
turn: an adapter for it is composed of the others, by its training data alone, and judged by its held-out records.
`trained` is the adapter that was left out. `apart` has the weights of the default, but sums A and B each by itself.
`--curves` trains on some tasks from the composed adapter, and from nothing, and notes held-out loss on the way.

A row for each task and seed is appended to `benchmarks/results/adapter_bank.jsonl`.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from adapter_bank_rows import RESULTS, rows_of, tables
from adapter_bank_tasks import Task, read_tasks
from peft import LoraConfig, PeftModel, get_peft_model
from predictor_text import load_encoder, pad
from rows import append_rows, environment
from safetensors.torch import load_file
from surrogate_models import descend, load, target_modules
from torch import Tensor, nn

from sparse_compile.bank.adapter import open_adapter
from sparse_compile.bank.adapter_bank import AdapterBank
from sparse_compile.bank.distances import DISTANCES
from sparse_compile.bank.index import ADAPTERS
from sparse_compile.bank.weighting import WEIGHTINGS
from sparse_compile.calibration.losses import held_out_loss

EVALUATION_BATCH = 12
MARKS = (0, 2, 5, 10, 20)
"""Steps before which a curve notes the held-out loss; it also does at the end."""


@dataclass(frozen=True)
class Settings:
    """What all runs have in common; part of every row.

    Attributes:
        model: name of the folder.
        steps: optimizer steps of an adapter.
        batch_size: sequences of a step; an adapter sees each of its records once.
        held_out: records that a task is judged by, at least.
        longest: tokens of a record; longer ones are left out.
        rank: of the adapters, on all linear layers; their scale is 2.
        lr: peak learning rate of AdamW; it rises over five steps and falls linearly to zero.
    """

    model: str
    steps: int = 30
    batch_size: int = 4
    held_out: int = 24
    longest: int = 160
    rank: int = 8
    lr: float = 2e-3


class Bench:
    """A base model, its tasks, and a bank of one adapter for each."""

    def __init__(self, args: argparse.Namespace, settings: Settings, seed: int) -> None:
        self.settings, self.seed, self.folder = settings, seed, args.model
        self.base: Any = load(args.model)
        config = transformers.AutoConfig.from_pretrained(args.model)
        tasks = read_tasks(
            args.e2e,
            args.gsm8k,
            load_encoder(args.model),
            config.bos_token_id,
            config.eos_token_id,
            sizes=(settings.steps * settings.batch_size, settings.held_out),
            longest=settings.longest,
        )
        self.tasks = {task.name: task for task in tasks}
        key = "-".join(str(each) for each in dataclasses.astuple(settings))
        place = args.cache / f"bank-{key}-seed{seed}"
        self.bank = AdapterBank(place) if place.exists() else AdapterBank.create(place, args.model)

    def fill(self) -> None:
        """Train the adapters that the bank lacks."""
        known = {record.name for record in self.bank.list()}
        for task in self.tasks.values():
            if task.name not in known:
                with tempfile.TemporaryDirectory() as made:
                    losses, _ = self.train(task, None, made)
                    self.bank.add(task.name, made, task.sequences, base=self.folder, provenance=f"seed {self.seed}")
                print(f"trained {task.name}: {losses[0]:.3f} to {losses[-1]:.3f}", flush=True)

    def train(self, task: Task, start: Path | None, save: str | None = None) -> tuple[list[float], dict[int, float]]:
        """Train an adapter; return the losses of the steps, and the held-out losses at `MARKS` unless it is saved."""
        settings = self.settings
        torch.manual_seed(1000 * self.seed + sorted(self.tasks).index(task.name))
        model = self._cold() if start is None else PeftModel.from_pretrained(self.base, start, is_trainable=True)
        model.train()
        curve: dict[int, float] = {}
        step = -1

        def call(**batch: Tensor) -> Any:
            nonlocal step
            step += 1
            if save is None and step in MARKS:
                curve[step] = self.judge(model, task)
                model.train()
            return model(**batch)

        size = settings.batch_size
        batches = [task.train[begin : begin + size] for begin in range(0, settings.steps * size, size)]
        trained = [each for each in model.parameters() if each.requires_grad]
        losses, _ = descend(call, trained, batches, pad, settings.lr)
        if save is None:
            curve[settings.steps] = self.judge(model, task)
        else:
            model.save_pretrained(save)
        self.base = model.unload()
        return losses, curve

    def _cold(self) -> PeftModel:
        rank = self.settings.rank
        targets = target_modules(self.base.config.model_type, "all")
        return get_peft_model(
            self.base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
        )

    @torch.no_grad()
    def judge(self, model: nn.Module, task: Task) -> float:
        """Return the mean loss of the held-out answer tokens."""
        model.eval()
        begins = range(0, len(task.held_out), EVALUATION_BATCH)
        batches = [dict(vars(pad(task.held_out[begin : begin + EVALUATION_BATCH]))) for begin in begins]
        return held_out_loss(lambda batch: model(**batch), batches)

    def judge_folder(self, folder: Path, task: Task) -> float:
        """Return the held-out loss of a PEFT adapter."""
        model = PeftModel.from_pretrained(self.base, folder)
        try:
            return self.judge(model, task)
        finally:
            self.base = model.unload()

    def leave_out(self, task: Task) -> dict[str, Any]:
        """Compose adapters for a task of all others; return held-out losses by arm, and how the weights came about."""
        others = [record.name for record in self.bank.list() if record.name != task.name]
        losses = {"base": self.judge(self.base, task), "trained": self.judge_folder(self._stored(task.name), task)}
        chosen: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as made:

            def judged(arm: str, weights: Mapping[str, float]) -> None:
                folder = Path(made) / arm.replace("/", "-")
                self.bank.combine(weights, folder, progress=False)
                losses[arm] = self.judge_folder(folder, task)

            judged("uniform", {name: 1 / len(others) for name in others})
            for distance in DISTANCES:
                for weighting in WEIGHTINGS:
                    arm = f"{weighting}/{distance}"
                    near = self.bank.neighbours(
                        task.sequences, distance=distance, weighting=weighting, without=[task.name]
                    )
                    judged(arm, near.weights)
                    best = max(near.weights, key=lambda name: near.weights[name])
                    chosen[arm] = {
                        "temperature": near.temperature,
                        "bank_error": near.error,
                        "largest": [best, round(near.weights[best], 3)],
                    }
            near = self.bank.neighbours(task.sequences, without=[task.name])
            judged("nearest", {min(near.distances, key=lambda name: near.distances[name]): 1.0})
            composed = Path(made) / "default"
            found = self.bank.combine(near, composed, progress=False)
            apart, difference = self._apart(near.weights, composed)
            losses["apart"] = self.judge_folder(apart, task)
        return {"losses": losses, "chosen": chosen, "rank_error": found.error, "apart_difference": difference}

    def curves(self, task: Task) -> dict[str, dict[int, float]]:
        """Train with and without a composed start; return held-out losses by step."""
        with tempfile.TemporaryDirectory() as made:
            start = Path(made) / "start"
            self.bank.compose(task.sequences, start, without=[task.name], rank=self.settings.rank, progress=False)
            return {"cold": self.train(task, None)[1], "composed": self.train(task, start)[1]}

    def _stored(self, name: str) -> Path:
        return next(self.bank.folder / ADAPTERS / each.folder for each in self.bank.list() if each.name == name)

    def _apart(self, weights: Mapping[str, float], composed: Path) -> tuple[Path, float]:
        """Sum A and B each by itself, in the place of a composed adapter; return it, and how far it is from that.

        The distance is |D' - D| / |D| over all layers, Frobenius.
        """
        exact = open_adapter(composed)
        products = {name: exact.layers[name].scale * (b @ a) for name, (a, b) in _factors(exact).items()}
        files = [
            (weight, load_file(self._stored(name) / "adapter_model.safetensors")) for name, weight in weights.items()
        ]
        sums = {key: sum((weight * file[key] for weight, file in files), torch.zeros(())) for key in files[0][1]}
        folder = composed.with_name("apart")
        model = PeftModel.from_pretrained(self.base, self._stored(max(weights, key=lambda name: weights[name])))
        model.load_state_dict({_in_model(key): each for key, each in sums.items()}, strict=False)
        model.save_pretrained(folder)
        self.base = model.unload()
        other = open_adapter(folder)
        square = difference = 0.0
        for name, (a, b) in _factors(other).items():
            product = other.layers[name].scale * (b @ a)
            difference += float((product - products[name]).square().sum())
            square += float(products[name].square().sum())
        return folder, (difference / square) ** 0.5


def _factors(adapter: Any) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: adapter.factors(name) for name in adapter.layers}


def _in_model(key: str) -> str:
    return key.replace(".weight", ".default.weight")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.table:
        print(tables(rows_of(args.out)))
        return 0
    if not (args.model and args.e2e and args.gsm8k and args.cache):
        parser.error("--model, --e2e, --gsm8k and --cache are needed, or --table alone")
    settings = Settings(args.model.name, steps=args.steps)
    origin = environment("adapter_bank.py", [re.sub(r"[^=,]*/", "", each) for each in arguments])
    for seed in args.seeds:
        bench = Bench(args, settings, seed)
        bench.fill()
        for kind, names in (("leave-one-out", args.tasks or list(bench.tasks)), ("curve", args.curves)):
            run: Callable[[Task], dict[str, Any]] = bench.leave_out if kind == "leave-one-out" else bench.curves
            for name in names:
                same = {"kind": kind, "settings": dataclasses.asdict(settings), "task": name, "seed": seed}
                if any(same.items() <= row.items() for row in rows_of(args.out)):
                    continue
                append_rows([{**same, **run(bench.tasks[name]), **origin}], args.out)
                print(f"{kind} {name}, seed {seed}", flush=True)
    print(tables(rows_of(args.out)))
    return 0


def _parser() -> argparse.ArgumentParser:
    def files(text: str) -> list[Path]:
        return [Path(each) for each in text.split(",")]

    def names(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, help="folder of a model")
    add("--e2e", type=files, help="files of E2E, with commas")
    add("--gsm8k", type=files, help="files of GSM8K, with commas")
    add("--cache", type=Path, help="folder for banks of trained adapters")
    add("--seeds", type=lambda text: [int(each) for each in text.split(",")], default=[0, 1])
    add("--tasks", type=names, help="tasks to leave out (default: each)")
    add("--curves", type=names, default=[], help="tasks to train on from a composed adapter")
    add("--steps", type=int, default=Settings.steps, help="optimizer steps of an adapter (default: %(default)s)")
    add("--table", action="store_true", help="print the tables of the rows, and run nothing")
    add("--out", type=Path, default=RESULTS, help="where rows are kept (default: %(default)s)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
