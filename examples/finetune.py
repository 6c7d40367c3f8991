"""Fine-tune one model with LoRA several times from the same start, dense and sparse, and compare.

Without arguments it needs no download: it makes a small Llama, pre-trains it on short word problems for about a minute,
and fine-tunes it on longer ones with plain Inductor and with preset auto of the `sparselora` backend, three times each.

    python examples/finetune.py
    python examples/finetune.py --model DIR_OR_HUB_ID --data train.jsonl --eval-data test.jsonl --preset o2 --steps 300

Rows of data have the fields prompt and completion, or question and answer, or chat messages. The output folder gets a
PEFT adapter for each arm, `results.json`, `losses.csv`, a picture `comparison.png`, and for each kind of sparse step a
page that shows what it computes.
"""

from __future__ import annotations

import argparse
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from finetuning.arms import DENSE, Arm, TrainedArm, TrainingPlan, list_arms, reload_plain, train_arm
from finetuning.demo_model import DemoSize, as_records, pretrained
from finetuning.measure import (
    Batch,
    Quality,
    StepWork,
    held_out_quality,
    paired_step_times,
    step_work,
)
from finetuning.report import Result, pages, save, table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sparse_compile.cli.records import Collator, DataError, Example, Record, pad_token_id, read_records, tokenize

TIMING_BATCHES = 4
FOLLOWED = 32
"""Held-out examples on which the loss of the dense function is followed while an arm trains."""

RECOMPILE_LIMIT = 64
"""All arms run the same `forward`, for which Dynamo counts compilations; its default of 8 is meant for one arm."""

# A model this small has hardly a channel to spare, so adapters learn to lean on the sparse function and lose much of
# what they learned where the dense one is evaluated; a dense end of the run mends that.
DEMO_DEFAULTS = {
    "steps": 150,
    "max_length": 96,
    "lr": 3e-3,
    "pad_to_multiple_of": 96,
    "end_step": 0.85,
    "seeds": (0, 1, 2),
}
OWN_DEFAULTS = {"steps": 300, "max_length": 512, "lr": 1e-3, "pad_to_multiple_of": 32, "seeds": (0,)}


@dataclass(frozen=True)
class Task:
    """A model and what it is to learn.

    Attributes:
        base: the model, whose weights stay as they are.
        tokenizer: its tokenizer.
        train: examples to learn.
        held_out: examples to evaluate on.
        too_long: rows left out because they exceed the maximal length.
    """

    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train: list[Example]
    held_out: list[Example]
    too_long: int


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison that the command line asks for."""
    parser = build_parser()
    options = parse_options(parser, argv)
    # PEFT reads a deprecated attribute of transformers, once for every arm.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    try:
        arms = list_arms(options.presets, options.seeds, options.start_step, options.end_step, options.ablations)
        task = prepare_task(options, out)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    print(f"{len(task.train)} examples to learn, {len(task.held_out)} held out ({task.too_long} rows too long)")
    # A frame over the limit would run uncompiled, and its time would be reported as that of its arm.
    with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT, fail_on_recompile_limit_hit=True):
        results = compare(task, arms, options, out)
    run = {
        "options": vars(options),
        "data": {"train": len(task.train), "held_out": len(task.held_out), "too_long": task.too_long},
    }
    save(results, run, out)
    print(f"\n{table(results)}\n\nadapters, results.json, losses.csv and comparison.png: {out}")
    for page in pages(results):
        print(f"what each sparse step computes, and why: {page}")


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    task = parser.add_argument_group("model and data (without --model: the demo's own)")
    task.add_argument("--model", help="folder or hub id of a causal language model")
    task.add_argument("--data", help=".jsonl file or hub id (ID or ID:CONFIGURATION; its train split) to learn")
    task.add_argument("--eval-data", help="the same, held out (default: the last rows of --data)")
    task.add_argument("--eval-examples", type=positive, default=200, help="held-out rows (default: %(default)s)")
    task.add_argument("--max-length", type=positive, help="rows with more tokens are left out (default: 512)")
    task.add_argument("--pad-to-multiple-of", type=positive, help="round batch lengths up (default: 32)")
    task.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the frozen weights")
    task.add_argument("--out", default="out/finetune", help="output folder (default: %(default)s)")

    arms = parser.add_argument_group("arms")
    which = arms.add_mutually_exclusive_group()
    which.add_argument("--presets", type=names, default=(DENSE, "auto"), help="default: dense,auto")
    which.add_argument("--preset", help="one preset against dense")
    arms.add_argument("--start-step", type=step_or_fraction, help="first sparse step: 20 (steps) or 0.1 (of the run)")
    arms.add_argument(
        "--end-step", type=step_or_fraction, help="first dense step after them (default: none; demo: 0.85)"
    )
    arms.add_argument("--ablations", action="store_true", help="add the two wrong choices of tokens (Table 8)")
    arms.add_argument(
        "--seeds", type=integers, help="of adapters and data order; each arm runs with each (default: 0; demo: 0,1,2)"
    )

    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=positive, help="of each arm (default: 300)")
    training.add_argument("--batch-size", type=positive, default=8, help="default: %(default)s")
    training.add_argument("--lr", type=float, help="peak learning rate (default: 1e-3)")
    training.add_argument("--rank", type=positive, default=16, help="of the adapters (default: %(default)s)")
    training.add_argument("--alpha", type=float, default=32, help="LoRA's alpha (default: %(default)s)")
    training.add_argument(
        "--targets", type=names, default=("q_proj", "k_proj", "v_proj", "o_proj"), help="layers with adapters"
    )
    training.add_argument("--timing-rounds", type=positive, default=16, help="paired timing (default: %(default)s)")

    demo = parser.add_argument_group("size of the demo")
    demo.add_argument("--problems", type=positive, default=DemoSize.problems, help="default: %(default)s")
    demo.add_argument("--pretrain-steps", type=positive, default=DemoSize.pretrain_steps, help="default: %(default)s")
    demo.add_argument("--layers", type=positive, default=DemoSize.layers, help="default: %(default)s")
    demo.add_argument("--hidden", type=positive, default=DemoSize.hidden, help="default: %(default)s")
    return parser


def parse_options(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line and fill in the defaults that depend on each other."""
    options = parser.parse_args(argv)
    if (options.model is None) != (options.data is None):
        parser.error("--model and --data go together")
    if options.eval_data and not options.data:
        parser.error("--eval-data needs --model and --data")
    if options.hidden % 32:
        parser.error(f"--hidden is a multiple of 32 (the size of a head), got {options.hidden}")
    for name, value in (DEMO_DEFAULTS if options.model is None else OWN_DEFAULTS).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.preset is not None:
        options.presets = (DENSE, options.preset)
    return options


def positive(text: str) -> int:
    """Parse an integer of at least one."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"at least 1, got {value}")
    return value


def names(text: str) -> tuple[str, ...]:
    """Parse names separated by commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def integers(text: str) -> tuple[int, ...]:
    """Parse integers separated by commas."""
    return tuple(int(number) for number in names(text))


def step_or_fraction(text: str) -> int | float:
    """Parse a number of steps (`20`) or a fraction of the run (`0.1`)."""
    try:
        return int(text)
    except ValueError:
        return float(text)


def prepare_task(options: argparse.Namespace, out: Path) -> Task:
    """Load or make the model and its data.

    Raises:
        ValueError: the model or the data cannot be used; the message says why.
    """
    if options.model is None:
        options.model = str((out / "base").resolve())
        held_out_from, train_from = make_demo(options)
    else:
        held_out_from, train_from = split_records(options)
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        base = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    except OSError as error:
        raise ValueError(f"--model {options.model}: {error}") from error
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    train, long_train = tokenize(train_from, tokenizer, options.max_length)
    held_out, long_held_out = tokenize(held_out_from, tokenizer, options.max_length)
    if len(train) < options.batch_size:
        raise DataError(f"{len(train)} examples to learn make no batch of {options.batch_size}")
    return Task(base.to(device), tokenizer, train, held_out[: options.eval_examples], long_train + long_held_out)


def make_demo(options: argparse.Namespace) -> tuple[list[Record], list[Record]]:
    """Pre-train the demo's model into the folder `options.model`; return held-out rows and rows to learn."""
    size = DemoSize(options.problems, options.layers, options.hidden, options.pretrain_steps)
    model, tokenizer, problems = pretrained(size, options.seeds[0])
    model.save_pretrained(options.model)
    tokenizer.save_pretrained(options.model)
    return split(as_records(problems, "stories"), options.eval_examples)


def split_records(options: argparse.Namespace) -> tuple[list[Record], list[Record]]:
    """Read the user's data; return held-out rows and rows to learn."""
    records = read_records(options.data)
    if options.eval_data is None:
        return split(records, options.eval_examples)
    return read_records(options.eval_data), records


def split(records: list[Record], held_out: int) -> tuple[list[Record], list[Record]]:
    """Hold the last rows out, but never more than a fifth."""
    border = len(records) - min(held_out, max(1, len(records) // 5))
    return records[border:], records[:border]


def compare(task: Task, arms: Sequence[Arm], options: argparse.Namespace, out: Path) -> list[Result]:
    """Train every arm, evaluate its saved adapter, then time one arm of each kind in turns."""
    plan = TrainingPlan(
        options.steps, options.batch_size, options.lr, options.rank, options.alpha, tuple(options.targets)
    )
    collate = Collator(pad_token_id(task.tokenizer), options.pad_to_multiple_of, options.max_length)
    trained: list[TrainedArm] = []
    qualities: list[Quality] = []
    for arm in arms:
        trained.append(train_arm(task.base, arm, plan, task.train, task.held_out[:FOLLOWED], collate, out))
        plain = reload_plain(task.base, trained[-1])
        qualities.append(held_out_quality(plain, task.held_out, collate, task.tokenizer))
        print(f"{arm.name}: held-out loss {qualities[-1].loss:.4f}, exact match {qualities[-1].exact_match:.1%}")
    batches = sample_batches(task.train, plan.batch_size, collate)
    # Other seeds of a kind run the very same code.
    timed = {t.arm.kind: t for t in reversed(trained)}
    times = paired_step_times(
        {kind: timed[kind] for kind in dict.fromkeys(arm.kind for arm in arms)}, batches, options.timing_rounds
    )
    work = measure_work(task.base, list(timed.values()), plan, batches[0], out)
    return [
        Result(t, quality, times[t.arm.kind], work.get(t.arm.kind))
        for t, quality in zip(trained, qualities, strict=True)
    ]


def sample_batches(examples: Sequence[Example], batch_size: int, collate: Collator) -> list[Batch]:
    """Draw the batches that all arms are timed on."""
    rng = random.Random(0)
    return [collate(rng.sample(examples, batch_size)) for _ in range(TIMING_BATCHES)]


def measure_work(
    base: PreTrainedModel, trained: Sequence[TrainedArm], plan: TrainingPlan, batch: Batch, out: Path
) -> dict[str, StepWork]:
    """Measure the work of a step of each kind of arm; a dense one's is what a sparse one started from."""
    measured = {
        t.arm.kind: step_work(base, plan, t.arm.config, batch, out / f"{t.arm.kind}.html")
        for t in trained
        if t.arm.config is not None
    }
    dense = next(iter(measured.values()), None)
    if dense is not None:
        measured |= {t.arm.kind: dense for t in trained if t.arm.config is None}
    return measured


if __name__ == "__main__":
    main()
