"""Compose adapters for tasks that a bank has not seen, and compare held-out loss with training and with plain averages.

    python benchmarks/adapter_bank.py --model DIR --e2e e2e/train.txt,e2e/test.txt \\
        --gsm8k gsm8k/train.jsonl,gsm8k/test.jsonl --cache DIR [--seeds 0,1] [--sweep] [--curves gsm8k-add]
    python benchmarks/adapter_bank.py --table --document docs/adapter_bank.md    # the tables of the rows that are there

One adapter is trained for each of 14 tasks (`adapter_bank_tasks.py`) and put into a bank. Then each task is left out in
turn: an adapter for it is composed of the others, by its training data alone, and judged by its held-out records.
`trained` is the adapter that was left out. `apart` has the weights of the default, but sums A and B each by itself.
`--sweep` composes at several ranks, and by several temperatures. `--curves` trains on some tasks from the composed
adapter, and from nothing, and notes held-out loss on the way.

A row for each task and seed is appended to `benchmarks/results/adapter_bank.jsonl`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
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
from markdown import replace_tables
from peft import LoraConfig, PeftModel, get_peft_model
from predictor_text import load_encoder, pad
from rows import append_rows, environment
from surrogate_models import descend, load, target_modules
from torch import Tensor, nn

from sparse_compile.bank.adapter import open_adapter
from sparse_compile.bank.adapter_bank import AdapterBank, Neighbours
from sparse_compile.bank.compose import Composition
from sparse_compile.bank.distances import DISTANCES
from sparse_compile.bank.index import ADAPTERS
from sparse_compile.bank.weighting import WEIGHTINGS
from sparse_compile.calibration.losses import held_out_loss

MARKS = (0, 2, 5, 10, 20)
"""Steps before which a curve notes the held-out loss; it also does at the end."""


RANKS = (4, 8, 16, 32, 104)
TEMPERATURES = (0.05, 0.1, 0.2, 0.4, 0.8)
SWEPT_RANK = 32
"""Rank at which temperatures are compared: little is left out then."""


@dataclass(frozen=True)
class Settings:
    """What all runs have in common; part of every row.

    Attributes:
        model: name of the folder.
        steps: optimizer steps of an adapter.
        batch_size: sequences of a step; an adapter sees each of its records once.
        held_out: records of a task that are kept from learning, at least.
        judged: so many of them, the first, are what it is judged by.
        longest: tokens of a record; longer ones are left out.
        rank: of the adapters, on all linear layers; their scale is 2.
        lr: peak learning rate of AdamW; it rises over five steps and falls linearly to zero.
    """

    model: str
    steps: int = 30
    batch_size: int = 4
    held_out: int = 24
    judged: int = 12
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
        learned = {name: each for name, each in dataclasses.asdict(settings).items() if name != "judged"}
        key = "-".join(str(each) for each in learned.values())
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
        batch = dict(vars(pad(task.held_out[: self.settings.judged])))
        return held_out_loss(lambda each: model(**each), [batch])

    @torch.no_grad()
    def judge_changes(self, changes: Mapping[str, Tensor], task: Task) -> float:
        """Return the held-out loss of the base with changes of its weights, by layer."""
        weights = {name: self.base.get_submodule(name).weight for name in changes}
        before = {name: weight.clone() for name, weight in weights.items()}
        try:
            for name, weight in weights.items():
                weight.add_(changes[name])
            return self.judge(self.base, task)
        finally:
            for name, weight in weights.items():
                weight.copy_(before[name])

    def leave_out(self, task: Task, distances: Sequence[str]) -> dict[str, Any]:
        """Compose adapters for a task of all others; return held-out losses by arm, and how the weights came about."""
        others = [record.name for record in self.bank.list() if record.name != task.name]
        losses = {
            "base": self.judge(self.base, task),
            "trained": self.judge_changes(products(self._stored(task.name)), task),
        }
        chosen: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as made:

            def judged(arm: str, weights: Neighbours | Mapping[str, float]) -> Composition:
                found = self.bank.combine(weights, Path(made) / arm.replace("/", "-"), progress=False)
                losses[arm] = self.judge_changes(products(found.folder), task)
                return found

            judged("uniform", {name: 1 / len(others) for name in others})
            for distance, weighting in itertools.product(distances, WEIGHTINGS):
                arm = f"{weighting}/{distance}"
                near = self.bank.neighbours(task.sequences, distance=distance, weighting=weighting, without=[task.name])
                judged(arm, near)
                best = max(near.weights, key=lambda name: near.weights[name])
                chosen[arm] = {
                    "temperature": near.temperature,
                    "bank_error": near.error,
                    "largest": [best, round(near.weights[best], 3)],
                }
            near = self.bank.neighbours(task.sequences, without=[task.name])
            judged("nearest", {min(near.distances, key=lambda name: near.distances[name]): 1.0})
            found = judged("default", near)
            exact, apart = products(found.folder), self._apart(near.weights)
            losses["apart"] = self.judge_changes(apart, task)
            del losses["default"]  # it stands among the others by its name
        return {
            "losses": losses,
            "chosen": chosen,
            "rank_error": found.error,
            "apart_difference": _norm({name: apart[name] - exact[name] for name in exact}) / _norm(exact),
        }

    def sweep(self, task: Task) -> dict[str, dict[float, float]]:
        """Compose adapters of several ranks, and by several temperatures; return held-out losses by each."""
        found: dict[str, dict[float, float]] = {"ranks": {}, "temperatures": {}}
        with tempfile.TemporaryDirectory() as made:

            def judged(kind: str, value: float, near: Neighbours, rank: int) -> None:
                composed = self.bank.combine(near, Path(made) / f"{kind}{value}", rank=rank, progress=False)
                found[kind][value] = self.judge_changes(products(composed.folder), task)

            near = self.bank.neighbours(task.sequences, without=[task.name])
            for rank in RANKS:
                judged("ranks", rank, near, rank)
            for temperature in TEMPERATURES:
                near = self.bank.neighbours(task.sequences, without=[task.name], temperature=temperature)
                judged("temperatures", temperature, near, SWEPT_RANK)
        return found

    def curves(self, task: Task) -> dict[str, dict[int, float]]:
        """Train with and without a composed start; return held-out losses by step."""
        with tempfile.TemporaryDirectory() as made:
            start = Path(made) / "start"
            self.bank.compose(task.sequences, start, without=[task.name], rank=self.settings.rank, progress=False)
            return {"cold": self.train(task, None)[1], "composed": self.train(task, start)[1]}

    def _stored(self, name: str) -> Path:
        return next(self.bank.folder / ADAPTERS / each.folder for each in self.bank.list() if each.name == name)

    def _apart(self, weights: Mapping[str, float]) -> dict[str, Tensor]:
        """Return the product of the sums of B and of A, each by itself."""
        adapters = {name: open_adapter(self._stored(name)) for name in weights}
        changes = {}
        for layer, sizes in next(iter(adapters.values())).layers.items():
            pairs = {name: adapter.factors(layer) for name, adapter in adapters.items()}
            a, b = (torch.stack([weights[name] * pairs[name][k] for name in pairs]).sum(0) for k in (0, 1))
            changes[layer] = sizes.scale * (b @ a)
        return changes


def products(folder: Path) -> dict[str, Tensor]:
    """Return s B A of each layer of an adapter."""
    adapter = open_adapter(folder)
    factors = {name: adapter.factors(name) for name in adapter.layers}
    return {name: adapter.layers[name].scale * (b @ a) for name, (a, b) in factors.items()}


def _norm(changes: Mapping[str, Tensor]) -> float:
    return sum(float(each.double().square().sum()) for each in changes.values()) ** 0.5


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.table:
        text = tables(rows_of(args.out))
        print(text)
        if args.document:
            replace_tables(args.document, "adapter_bank", text)
        return 0
    if not (args.model and args.e2e and args.gsm8k and args.cache):
        parser.error("--model, --e2e, --gsm8k and --cache are needed, or --table alone")
    settings = Settings(args.model.name, steps=args.steps)
    origin = environment("adapter_bank.py", [re.sub(r"[^=,]*/", "", each) for each in arguments])
    for seed in args.seeds:
        bench = Bench(args, settings, seed)
        bench.fill()
        tasks, kinds = args.tasks or list(bench.tasks), {"sweep": bench.sweep, "curve": bench.curves}
        for kind, names in (("leave-one-out", tasks), ("sweep", tasks if args.sweep else ()), ("curve", args.curves)):
            leave_out = functools.partial(bench.leave_out, distances=args.distances)
            run: Callable[[Task], dict[str, Any]] = kinds.get(kind, leave_out)
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
    add(
        "--distances",
        type=names,
        default=list(DISTANCES),
        help="to compose by, each with each weighting (default: all)",
    )
    add("--sweep", action="store_true", help="compose by several ranks and temperatures as well")
    add("--curves", type=names, default=[], help="tasks to train on from a composed adapter")
    add("--steps", type=int, default=Settings.steps, help="optimizer steps of an adapter (default: %(default)s)")
    add("--table", action="store_true", help="print the tables of the rows, and run nothing")
    add("--document", type=Path, help="also put the tables of --table into this document")
    add("--out", type=Path, default=RESULTS, help="where rows are kept (default: %(default)s)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
