"""The support matrix, training: what people wrap around a model leaves its sparse steps sparse, or says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adapter_rows import SITES, peft
from models import batch
from oracle import told
from sparse_compile import SparseLoRACallback
from sparse_compile.kernels.channel_selection import record_channels
from sparse_compile.training.session import session_for
from sweeps import sweep

STEPS = 3
FFN = "layers.0.mlp"


def model_for(start_step: int = 0, **options: Any) -> nn.Module:
    model = peft(**options)()
    model.compile(backend="sparselora", options={"layer_sparsity": SITES, "preset": "none", "start_step": start_step})
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def rows(count: int = 8) -> list[dict[str, torch.Tensor]]:
    found = batch(97, rows=count, length=12)
    return [{name: values[i] for name, values in found.items()} for i in range(count)]


def trainer_for(model: nn.Module, folder: Path, **arguments: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    kind = arguments.pop("trainer", Trainer)
    own = {name: arguments.pop(name) for name in ("optimizers", "compute_loss_func") if name in arguments}
    settings = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "report_to": [], "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "use_cpu": True, **arguments,
    }  # fmt: skip
    evaluated = rows() if "eval_strategy" in settings else None
    callbacks = [SparseLoRACallback()]
    return kind(
        model, TrainingArguments(**settings), train_dataset=rows(), eval_dataset=evaluated, callbacks=callbacks, **own
    )


# --- Runs of a trainer ------------------------------------------------------------------------------------------------


def plain(model: nn.Module, folder: Path) -> None:
    trainer_for(model, folder, gradient_accumulation_steps=2, num_train_epochs=2, max_steps=-1).train()


def reloads_the_best(model: nn.Module, folder: Path) -> None:
    every = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = trainer_for(model, folder, load_best_model_at_end=True, learning_rate=0.5, **every)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None
    from safetensors.torch import load_file

    saved = load_file(f"{best}/adapter_model.safetensors")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, saved[name.replace(".default", "")]), name


def bits_of_8(model: nn.Module, folder: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    optimizer = bitsandbytes.optim.AdamW8bit(trained(model), lr=1e-3, min_8bit_size=1)
    trainer_for(model, folder, optimizers=(optimizer, None)).train()


def lora_plus(model: nn.Module, folder: Path) -> None:
    from peft.optimizers import create_loraplus_optimizer

    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    assert max(group["lr"] for group in optimizer.param_groups) == pytest.approx(0.016)
    trainer_for(model, folder, optimizers=(optimizer, None)).train()


def accelerate_loop(model: nn.Module, folder: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    loader = torch.utils.data.DataLoader(rows(), batch_size=2)  # type: ignore[arg-type]
    model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(trained(model), lr=1e-3), loader)
    for inputs in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**inputs).loss)
            optimizer.step()
            optimizer.zero_grad()
    assert session_for(trained(model)).schedule.step == 2


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1, **{f"w{i}": i for i in range(2, 97)}}, "<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")


def sft(**options: Any) -> Callable[[nn.Module, Path], None]:
    def run(model: nn.Module, folder: Path) -> None:
        trl = pytest.importorskip("trl")
        from datasets import Dataset

        words = [" ".join(f"w{2 + (7 * i + j) % 90}" for j in range(9 + i)) for i in range(8)]
        data = Dataset.from_list([{"prompt": text + " ", "completion": "w5 w6 w7 w8"} for text in words])
        settings = trl.SFTConfig(
            output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
            save_strategy="no", disable_tqdm=True, use_cpu=True, bf16=False, gradient_checkpointing=False,
            max_length=32, **options,
        )  # fmt: skip
        trl.SFTTrainer(
            model, settings, train_dataset=data, processing_class=tokenizer(), callbacks=[SparseLoRACallback()]
        ).train()

    return run


@dataclass(frozen=True)
class TrainingRow:
    """A way to train.

    Attributes:
        title: what the page calls it.
        run: trains a compiled model, with a folder to write to.
        forwards: training forwards of the run, all of them sparse.
    """

    title: str
    run: Callable[[nn.Module, Path], None]
    forwards: int = STEPS


TRAINING: dict[str, TrainingRow] = {
    "accumulation": TrainingRow("`Trainer` with gradient accumulation", plain, forwards=8),
    "best_model": TrainingRow("`Trainer` that evaluates, saves and reloads the best model", reloads_the_best),
    "loraplus": TrainingRow("LoRA+ (`create_loraplus_optimizer`)", lora_plus),
    "bits_of_8": TrainingRow("8-bit optimizers (bitsandbytes)", bits_of_8),
    "accelerate": TrainingRow(
        "Accelerate's own loop (`prepare`, `accumulate`, `backward`)", accelerate_loop, forwards=4
    ),
    "sft": TrainingRow("TRL `SFTTrainer`, loss on completions", sft()),
    "packing": TrainingRow(
        "TRL `SFTTrainer` with packing (`position_ids`, no mask)", sft(packing=True, eval_packing=False)
    ),
}


@pytest.mark.parametrize("name", sweep(TRAINING, "accumulation"))
def test_a_way_to_train_is_sparse_at_every_step(name: str, tmp_path: Path, aot_eager_inductor: Any) -> None:
    row = TRAINING[name]
    model = model_for()
    before = [parameter.detach().clone() for parameter in trained(model)]
    with told() as messages, record_channels() as record:
        row.run(model, tmp_path)
    assert all(not torch.equal(now, then) for now, then in zip(trained(model), before, strict=True))
    assert messages == []
    # TRL calls the decoder below the head by itself, so the names of its modules begin there.
    (choices,) = (found for name, found in record.items() if name.endswith(FFN))
    assert len(choices) == row.forwards


# --- Labels that leave the model --------------------------------------------------------------------------------------


def smoothed(model: nn.Module, folder: Path) -> None:
    trainer_for(model, folder, label_smoothing_factor=0.1).train()


def a_loss_of_ones_own(model: nn.Module, folder: Path) -> None:
    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        logits = outputs.logits[:, :-1].flatten(0, 1)
        return nn.functional.cross_entropy(logits, labels[:, 1:].flatten())

    trainer_for(model, folder, compute_loss_func=loss).train()


@dataclass(frozen=True)
class DenseTrainingRow:
    """A way to train that keeps the labels from the model.

    Attributes:
        title: what the page calls it.
        run: trains a compiled model, with a folder to write to.
        declined: words of the one warning.
    """

    title: str
    run: Callable[[nn.Module, Path], None]
    declined: str = "Trainer keeps the labels from the model for label_smoothing_factor and compute_loss_func"


DENSE_TRAINING: dict[str, DenseTrainingRow] = {
    "label_smoothing": DenseTrainingRow("`Trainer` with `label_smoothing_factor`", smoothed),
    "compute_loss_func": DenseTrainingRow("`Trainer` with `compute_loss_func`", a_loss_of_ones_own),
}


@pytest.mark.parametrize("name", sweep(DENSE_TRAINING, "label_smoothing"))
def test_labels_that_leave_the_model_are_told_of(name: str, tmp_path: Path, eager_inductor: Any) -> None:
    row, model = DENSE_TRAINING[name], model_for()
    before = [parameter.detach().clone() for parameter in trained(model)]
    with told() as messages, record_channels() as record:
        row.run(model, tmp_path)
    assert all(not torch.equal(now, then) for now, then in zip(trained(model), before, strict=True))
    assert record == {} and not any(eager_inductor.sparse)
    (message,) = messages
    assert "sites that were asked for stay dense" in message or "so training runs dense" in message
    assert row.declined in message
