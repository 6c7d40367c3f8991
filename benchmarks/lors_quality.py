"""Fine-tune a pruned model in several ways and look at held-out loss after merging, for `lors.py`.

* `frozen`: the pruned model as it is.
* `lora`: plain LoRA; merging fills the zeros. Its loss is that of the merged model, dense, and again with the zeros set
  back to zero.
* `sqft`: masked by autograd (`lors_models.MaskedByAutograd`).
* `lors`: this backend with `preserve_weight_mask` and straight-through gradients; `lors-start` begins with
  `gradient_guided_start`; `lors-exact` has exact gradients, which are those of `sqft` up to rounding.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from lors_models import masked_by_autograd, prunable, prune
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from predictor_text import Example, load_encoder, pad, read_examples
from torch import Tensor, nn

from sparse_compile import gradient_guided_start, merge_masked
from sparse_compile.calibration.losses import held_out_loss

ARMS = ("lora", "sqft", "lors", "lors-start", "lors-exact")
EVALUATION_BATCH = 16


@dataclass(frozen=True)
class Settings:
    """What all runs of a table have in common; part of every row, and of what tells whether a run is done already.

    Attributes:
        steps: optimizer steps.
        batch_size: sequences of a step.
        length: tokens that each is padded to; longer records are left out.
        records: the records to learn from are the first so many that fit.
        held_out: the first so many of the held-out records that fit.
        calibration: records that Wanda and `lors-start` read, of those to learn from.
        lr: peak learning rate of AdamW without weight decay; it falls linearly to zero.
        rank: of the adapters, on all linear layers of the blocks.
        alpha: LoRA's.
    """

    steps: int = 40
    batch_size: int = 4
    length: int = 144
    records: int = 1500
    held_out: int = 64
    calibration: int = 32
    lr: float = 1e-3
    rank: int = 16
    alpha: float = 32.0


@dataclass(frozen=True)
class Measured:
    """What came of one run.

    Attributes:
        loss: held-out, in nats an answer token, of the merged model.
        loss_pruned_again: the same once the entries that were zero are zero again; None where none had changed.
        zeros: entries of the pruned weights that were zero.
        zeros_lost: those of them that the merged model has filled.
        train_loss: mean over the last ten steps; None without training.
        seconds: of processor time that training took, compilation included.
    """

    loss: float
    loss_pruned_again: float | None
    zeros: int
    zeros_lost: int
    train_loss: float | None = None
    seconds: float = 0.0


class Task:
    """A model, what it learns from, and what it is judged by."""

    def __init__(self, model: Path, data: Path, eval_data: Path, settings: Settings) -> None:
        self.settings = settings
        self.dense = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        encode, config = load_encoder(model), self.dense.config
        longest = min(settings.length, config.max_position_embeddings)
        self.examples = read_examples(data, encode, config, settings.records, longest)
        held_out = read_examples(eval_data, encode, config, settings.held_out, longest)
        # By length, so that little of a batch is padding.
        held_out.sort(key=lambda example: len(example[0]) + len(example[1]))
        self.held_out = _batches(held_out, EVALUATION_BATCH)
        self.calibration = _batches(self.examples[: settings.calibration], settings.batch_size)

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        """Return the mean loss of held-out answer tokens."""
        model.eval()
        return held_out_loss(lambda batch: model(**batch), self.held_out)


def _batches(examples: Sequence[Example], size: int, length: int | None = None) -> list[dict[str, Tensor]]:
    return [dict(vars(pad(examples[i : i + size], length))) for i in range(0, len(examples), size)]


class Pruned:
    """A pruned model, and adapters on it in each of the forms that train; each is compiled once for all seeds.

    Args:
        task: its dense model is copied.
        criterion: as in `lors_models.prune`.
        pattern: as in `lors_models.prune`.
    """

    def __init__(self, task: Task, criterion: str, pattern: str) -> None:
        self.task = task
        self.model = copy.deepcopy(task.dense)
        prune(self.model, criterion, pattern, task.calibration)
        self.masks = {name: layer.weight != 0 for name, layer in prunable(self.model).items()}
        self._forms: dict[str, tuple[nn.Module, Callable[..., Any]]] = {}

    def frozen(self) -> Measured:
        """Judge the pruned model as it is."""
        return self._judged(self.model)

    def train(self, arm: str, seed: int) -> Measured:
        """Train fresh adapters and judge the merged model."""
        settings = self.task.settings
        form = "lors" if arm == "lors-start" else arm
        if form not in self._forms:
            self._forms[form] = self._form(form)
        model, call = self._forms[form]
        torch.manual_seed(seed)
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer.reset_lora_parameters("default", True)
        if arm == "lors-start":
            gradient_guided_start(model, self.task.calibration, seed=seed)
        start = time.process_time()
        losses = _train(call, [p for p in model.parameters() if p.requires_grad], self.task, seed)
        seconds = time.process_time() - start
        merged = copy.deepcopy(model)
        merged = merged.merge_and_unload() if arm == "lora" else merge_masked(merged)
        last = losses[-min(10, settings.steps) :]
        return self._judged(merged, train_loss=sum(last) / len(last), seconds=seconds)

    def _form(self, form: str) -> tuple[nn.Module, Callable[..., Any]]:
        """Return a PEFT model on the shared weights, and what is called to train it."""
        settings = self.task.settings
        weights = [*self.model.parameters(), *self.model.buffers()]
        base = copy.deepcopy(self.model, memo={id(weight): weight for weight in weights})
        names = sorted({name.rpartition(".")[2] for name in self.masks})
        config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=names, task_type="CAUSAL_LM")
        model = get_peft_model(base, config).train()
        if form == "lora":
            return model, model
        if form == "sqft":
            return model, masked_by_autograd(model).train()
        rule = "exact" if form == "lors-exact" else "straight-through"
        options = {"preset": "none", "preserve_weight_mask": "auto", "mask_gradient": rule}
        return model, torch.compile(model, backend="sparselora", options=options)

    def _judged(self, model: nn.Module, **trained: Any) -> Measured:
        loss = self.task.loss(model)
        layers = prunable(model)
        lost = sum(int(((layers[name].weight != 0) & ~mask).sum()) for name, mask in self.masks.items())
        again = None
        if lost:
            with torch.no_grad():
                for name, mask in self.masks.items():
                    layers[name].weight.mul_(mask)
            again = self.task.loss(model)
        zeros = sum(int((~mask).sum()) for mask in self.masks.values())
        return Measured(loss, again, zeros, lost, **trained)


def _train(call: Callable[..., Any], parameters: list[nn.Parameter], task: Task, seed: int) -> list[float]:
    """Take the steps; return the loss of each. The order of the data is that of the seed, in all arms."""
    settings = task.settings
    order = random.Random(seed)
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0)
    losses = []
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * (1 - step / settings.steps)
        (batch,) = _batches(order.sample(task.examples, settings.batch_size), settings.batch_size, settings.length)
        loss = call(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


HEAD = ("pruning", "arm", "held-out loss, mean", "by seed", "zeros set back", "zeros lost")


def table(rows: Sequence[Mapping[str, Any]]) -> list[list[object]]:
    """Return the cells of a table of rows as plain data: a line for each pruning and arm."""
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["criterion"], row["pattern"], row["arm"]), []).append(row)
    order = {arm: index for index, arm in enumerate(("frozen", *ARMS))}
    prunings = list(dict.fromkeys(key[:2] for key in groups))
    cells: list[list[object]] = []
    for (criterion, pattern, arm), found in sorted(
        groups.items(), key=lambda each: (prunings.index(each[0][:2]), order[each[0][2]])
    ):
        found = sorted(found, key=lambda row: row["seed"])
        again = [row["loss_pruned_again"] for row in found if row["loss_pruned_again"] is not None]
        lost = {f"{row['zeros_lost'] / row['zeros']:.1%}" if row["zeros_lost"] else "0" for row in found}
        cells.append(
            [
                f"{criterion} {pattern}" if criterion != "none" else "not pruned",
                f"`{arm}`",
                f"{_mean([row['loss'] for row in found]):.4f}",
                ", ".join(f"{row['loss']:.4f}" for row in found),
                f"{_mean(again):.4f}" if again else "-",
                ", ".join(sorted(lost)),
            ]
        )
    return cells


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
