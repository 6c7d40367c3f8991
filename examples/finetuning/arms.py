"""Fine-tune one model several times from the same start, each time in another way: an *arm*."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from tqdm import tqdm
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from sparse_compile import SparseLoRACallback, SparseLoRAConfig
from sparse_compile.cli.records import Collator, Example
from sparse_compile.training.schedule import SPARSE, phase_at

DENSE = "dense"
ABLATIONS = ("all_sparse", "random_dense")
"""The two wrong choices of tokens in the SparseLoRA paper's Table 8 (values of `SparseLoRAConfig.token_selection`)."""

DENSE_LOSSES = 20
"""How often in a run the loss of the dense function is computed."""


@dataclass(frozen=True)
class Arm:
    """One way to fine-tune.

    Attributes:
        kind: what tables call it; runs that differ by their seed alone are of one kind.
        config: configuration of the `sparselora` backend; None compiles with plain Inductor.
        seed: seed of the adapters' start, of the order of the data and of dropout.
    """

    kind: str
    config: SparseLoRAConfig | None
    seed: int

    @property
    def name(self) -> str:
        """What its folder is called."""
        return f"{self.kind}-seed{self.seed}"


@dataclass(frozen=True)
class TrainingPlan:
    """What all arms have in common.

    Attributes:
        steps: optimizer steps of each arm.
        batch_size: sequences in a step.
        lr: peak learning rate; it warms up over the first twentieth of the steps and decays linearly to zero.
        rank: rank of the adapters.
        alpha: LoRA's alpha; adapters are scaled by `alpha / rank`.
        targets: names of the linear layers that carry adapters.
    """

    steps: int
    batch_size: int
    lr: float
    rank: int
    alpha: float
    targets: tuple[str, ...]


@dataclass(frozen=True)
class TrainedArm:
    """What came of one arm.

    Attributes:
        arm: what it was.
        model: the trained model, compiled; its frozen weights are those of the base model, not copies.
        losses: training loss of each step, in nats per answer token; of the sparse function in sparse steps.
        dense_losses: by step, the loss of the dense function on some held-out examples.
        step_seconds: duration of each step in the `Trainer` loop; the first ones contain the compilation.
        seconds: duration of the whole training.
        adapter: folder of the saved PEFT adapter.
        trainer: what trained it; a further step through it runs the code that is compiled already.
        sparse_steps: the steps (from 0) that were sparse; empty for a dense arm.
    """

    arm: Arm
    model: PeftModel
    losses: tuple[float, ...]
    dense_losses: Mapping[int, float]
    step_seconds: tuple[float, ...]
    seconds: float
    adapter: Path
    trainer: Trainer
    sparse_steps: tuple[int, ...]


def list_arms(
    presets: Sequence[str],
    seeds: Sequence[int],
    start_step: float | int | None,
    end_step: float | int | None,
    ablations: bool,
) -> list[Arm]:
    """List the arms to run: each kind with each seed.

    Args:
        presets: `dense` or presets of `SparseLoRAConfig`, in order.
        seeds: of adapters and data order; runs of one seed differ by nothing but their kind.
        start_step: as in `SparseLoRAConfig`.
        end_step: as in `SparseLoRAConfig`.
        ablations: add the wrong choices of tokens, on the last sparse preset.

    Raises:
        ValueError: an unknown preset, or ablations without any sparse preset.
    """
    kinds: dict[str, SparseLoRAConfig | None] = {
        preset: None if preset == DENSE else SparseLoRAConfig(preset=preset, start_step=start_step, end_step=end_step)
        for preset in presets
    }
    if ablations:
        sparse = [config for config in kinds.values() if config is not None]
        if not sparse:
            raise ValueError("ablations need a sparse preset beside them")
        for selection in ABLATIONS:
            config = dataclasses.replace(sparse[-1], token_selection=selection)
            kinds[f"{config.preset}-{selection.replace('_', '-')}"] = config
    return [Arm(kind, config, seed) for kind, config in kinds.items() for seed in seeds]


def adapted(base: PreTrainedModel, plan: TrainingPlan, seed: int) -> PeftModel:
    """Put fresh LoRA adapters on a copy of the model that shares the frozen weights with it."""
    set_seed(seed)
    model = get_peft_model(
        shallow_copy(base), LoraConfig(r=plan.rank, lora_alpha=plan.alpha, target_modules=list(plan.targets))
    )
    model.config.use_cache = False
    return model


def shallow_copy(base: PreTrainedModel) -> PreTrainedModel:
    """Copy the modules of a model, not its weights: any number of arms costs the memory of one."""
    weights = [*base.parameters(), *base.buffers()]
    return copy.deepcopy(base, memo={id(weight): weight for weight in weights})


def train_arm(
    base: PreTrainedModel,
    arm: Arm,
    plan: TrainingPlan,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    collate: Collator,
    out: Path,
) -> TrainedArm:
    """Fine-tune one arm with `transformers.Trainer` and save its adapter in `out/<arm>/adapter`.

    Args:
        base: the model.
        arm: how.
        plan: what all arms have in common.
        examples: to learn.
        held_out: on which the loss of the dense function is followed.
        collate: makes a batch.
        out: folder of all arms.
    """
    model = adapted(base, plan, arm.seed)
    if arm.config is None:
        model.compile(backend="inductor")
    else:
        model.compile(backend="sparselora", options=arm.config.to_options())
    with tqdm(total=plan.steps, desc=f"{arm.name:<16}", unit="step") as bar:
        recorder = Recorder(bar, {name: tensor.to(base.device) for name, tensor in collate(held_out).items()})
        trainer = Trainer(
            model=model,
            args=_arguments(plan, arm.seed, out / arm.name),
            train_dataset=list(examples),
            data_collator=collate,
            callbacks=[recorder, *([] if arm.config is None else [SparseLoRACallback()])],
        )
        # The progress bar shows the losses.
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    adapter = out / arm.name / "adapter"
    model.save_pretrained(adapter)
    return TrainedArm(
        arm,
        model,
        losses=tuple(recorder.losses),
        dense_losses=recorder.dense_losses,
        step_seconds=tuple(recorder.step_seconds),
        seconds=seconds,
        adapter=adapter,
        trainer=trainer,
        sparse_steps=sparse_steps(arm.config, plan.steps),
    )


def sparse_steps(config: SparseLoRAConfig | None, steps: int) -> tuple[int, ...]:
    """Return the steps (from 0) of a run of so many that a configuration makes sparse."""
    if config is None:
        return ()
    schedule = steps, config.start_step, config.dense_from, config.dense_period
    return tuple(step for step in range(steps) if phase_at(step, *schedule) == SPARSE)


def _arguments(plan: TrainingPlan, seed: int, folder: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=plan.steps,
        per_device_train_batch_size=plan.batch_size,
        learning_rate=plan.lr,
        lr_scheduler_type="linear",
        warmup_steps=plan.steps // 20,
        seed=seed,
        # Every batch has the same number of rows, so that only its length varies.
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )


@dataclass
class Recorder(TrainerCallback):
    """Note the losses and the duration of every step, and show them in a progress bar.

    Attributes:
        bar: the progress bar.
        held_out: a batch on which the loss of the dense function is followed.
    """

    bar: tqdm
    held_out: Mapping[str, torch.Tensor]
    losses: list[float] = field(default_factory=list)
    dense_losses: dict[int, float] = field(default_factory=dict)
    step_seconds: list[float] = field(default_factory=list)
    _start: float = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: PeftModel, **_: Any
    ) -> None:
        """Stop the clock. Losses are read at every step, so the device is never far behind."""
        self.step_seconds.append(time.perf_counter() - self._start)
        if state.global_step == 1:
            self.bar.unpause()  # the first step compiles, which is no measure of those that are left
        if state.global_step % max(1, state.max_steps // DENSE_LOSSES) == 0:
            self.dense_losses[state.global_step] = self._dense_loss(model)

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        """Note the loss; the summary at the end of the run has none."""
        if "loss" in logs:
            self.losses.append(logs["loss"])
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)
            self.bar.update()

    @torch.no_grad()
    def _dense_loss(self, model: PeftModel) -> float:
        model.eval()
        loss = model.forward(**self.held_out).loss  # not `model(...)`, which is compiled
        model.train()
        return float(loss)


def reload_plain(base: PreTrainedModel, trained: TrainedArm) -> PeftModel:
    """Load a saved adapter into plain PEFT, uncompiled, and check that nothing was lost on the way.

    All evaluation runs on what this returns: its figures are those a user of the saved adapter gets.
    """
    plain = PeftModel.from_pretrained(shallow_copy(base), trained.adapter).eval()
    was, now = get_peft_model_state_dict(trained.model), get_peft_model_state_dict(plain)
    assert was.keys() == now.keys(), f"{trained.adapter}: {sorted(was.keys() ^ now.keys())}"
    for name, tensor in was.items():
        assert torch.equal(tensor.cpu(), now[name].cpu()), f"{trained.adapter}: {name} changed"
    return plain


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are trained: the adapters."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
