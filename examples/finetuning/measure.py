"""Measure trained arms: loss and exact match on held-out data, step time in turns, and the work of a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import sparse_compile
from sparse_compile.cli.paired import paired_ratio, spread
from sparse_compile.cli.records import IGNORE_INDEX, Collator, Example, pad_token_id

from .arms import TrainedArm, TrainingPlan, adapted, trained_parameters

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Quality:
    """How well an arm does on held-out examples.

    Attributes:
        loss: mean loss in nats per answer token.
        exact_match: fraction of final answers that greedy decoding gets right.
    """

    loss: float
    exact_match: float


@dataclass(frozen=True)
class StepTime:
    """Duration of one warm training step (forward, backward and optimizer), in seconds.

    Attributes:
        median: the middle of all rounds.
        p20: the quantile that a fifth of the rounds stays below.
        p80: the quantile that a fifth of the rounds exceeds.
        speedup: dense time over this arm's, the median over rounds; None where no dense arm ran.
    """

    median: float
    p20: float
    p80: float
    speedup: float | None


@torch.no_grad()
def held_out_quality(
    model: PreTrainedModel,
    examples: Sequence[Example],
    collate: Collator,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 32,
) -> Quality:
    """Evaluate a plain model on held-out examples: loss on the answers, and final answers by greedy decoding."""
    total, count, right = 0.0, 0, 0
    # The longest answer of all bounds generation; an answer that is longer still is wrong anyway.
    limit = max(len(example.input_ids) - example.prompt_length for example in examples)
    for start in range(0, len(examples), batch_size):
        chunk = examples[start : start + batch_size]
        batch = {name: tensor.to(model.device) for name, tensor in collate(chunk).items()}
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        targets = batch["labels"][:, 1:].flatten()
        total += torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=IGNORE_INDEX, reduction="sum"
        ).item()
        count += int((targets != IGNORE_INDEX).sum())
        answers = _greedy_answers(model, chunk, tokenizer, limit)
        right += sum(final_answer(a) == final_answer(e.answer) for a, e in zip(answers, chunk, strict=True))
    return Quality(loss=total / count, exact_match=right / len(examples))


def _greedy_answers(
    model: PreTrainedModel, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, limit: int
) -> list[str]:
    prompts = [example.input_ids[: example.prompt_length] for example in examples]
    width = max(map(len, prompts))
    # Padded on the left: generation continues every row at the same place.
    pad = pad_token_id(tokenizer)
    ids = torch.tensor([[*[pad] * (width - len(p)), *p] for p in prompts], device=model.device)
    mask = torch.tensor([[*[0] * (width - len(p)), *[1] * len(p)] for p in prompts], device=model.device)
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=limit, do_sample=False, use_cache=True, pad_token_id=pad
    )
    return tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)


def final_answer(text: str) -> str:
    """Return what exact match compares: what follows `####` in the style of GSM8K, else the whole text."""
    answer = text.rsplit("####", 1)[-1]
    return " ".join(answer.replace(",", "").split())


def paired_step_times(arms: Mapping[str, TrainedArm], batches: Sequence[Batch], rounds: int) -> dict[str, StepTime]:
    """Time the arms in turns (A B C A B C ...) on the same batches.

    One arm's whole run after another's would also measure whatever else the machine did meanwhile; within one round it
    did about the same for all. The learning rate is zero, so that a step is a whole step and changes nothing.

    Args:
        arms: by name; the first dense one is what the others are compared with.
        batches: one for each round, used again when they run out.
        rounds: measured rounds, after every arm has run every batch once without being measured.
    """
    steps = {name: _step_function(trained) for name, trained in arms.items()}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    warm_up = len(batches)
    for index in tqdm(range(warm_up + rounds), desc=f"{'timing':<16}", unit="round"):
        for name, step in steps.items():
            duration = step(batches[index % len(batches)])
            if index >= warm_up:
                seconds[name].append(duration)
    dense = next((seconds[name] for name, trained in arms.items() if trained.arm.config is None), None)
    return {name: _summary(durations, dense) for name, durations in seconds.items()}


def _step_function(trained: TrainedArm) -> Callable[[Batch], float]:
    """Return a function that takes one training step and says how many seconds it took; a sparse arm's are sparse."""
    trainer, device = trained.trainer, trained.model.device
    optimizer = torch.optim.AdamW(trained_parameters(trained.model), lr=0.0, weight_decay=0.0)
    if trained.sparse_steps:
        trainer.state.global_step = trained.sparse_steps[0]

    def step(batch: Batch) -> float:
        # `SparseLoRACallback` hears where the run stands.
        trainer.callback_handler.on_step_begin(trainer.args, trainer.state, trainer.control)
        (inputs,), item_count = trainer.get_batch_samples(iter([batch]), 1, device)
        _synchronize(device)
        start = time.perf_counter()
        trainer.training_step(trained.model, inputs, item_count)
        optimizer.step()
        optimizer.zero_grad()
        _synchronize(device)
        return time.perf_counter() - start

    return step


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _summary(durations: list[float], dense: list[float] | None) -> StepTime:
    own = spread(durations)
    return StepTime(own.median, own.p20, own.p80, None if dense is None else paired_ratio(dense, durations).median)


@dataclass(frozen=True)
class StepWork:
    """The work of one training step: matrix products and attention, forward and backward, in floating-point operations.

    Attributes:
        dense: of the step as it was captured.
        rewritten: of the step as the backend runs it.
        sites: FFN and attention blocks that were found.
        sparse_sites: those of them that are computed sparsely.
        page: where all else is to be seen, in a browser.
    """

    dense: int
    rewritten: int
    sites: int
    sparse_sites: int
    page: Path


def step_work(
    base: PreTrainedModel, plan: TrainingPlan, config: sparse_compile.SparseLoRAConfig, batch: Batch, page: Path
) -> StepWork:
    """Ask `sparse_compile.explain` for the work of a step, without running one, and write its report as a page."""
    model = adapted(base, plan, seed=0).train()
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
    report = sparse_compile.explain(model, config=config, **inputs)
    report.save(page)
    return StepWork(
        dense=int(report.flops_before),
        rewritten=int(report.flops_after),
        sites=len(report.sites),
        sparse_sites=sum(site.sparse for site in report.sites),
        page=page,
    )
