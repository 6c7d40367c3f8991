"""The support matrix, training: what people wrap around a model leaves its sparse steps sparse, or says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models import batch, gradients
from oracle import assert_same_step, oracle_step, sparse_step, told, train_step
from sparse_compile import SparseLoRACallback
from sparse_compile.kernels.channel_selection import record_channels
from sparse_compile.session import session_for
from support.adapters import SITES, peft
from support.rows import NotSupportedError, cases

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
    own = {name: arguments.pop(name) for name in ("compute_loss_func", "optimizers") if name in arguments}
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


def smooths_labels(model: nn.Module, folder: Path) -> None:
    trainer_for(model, folder, label_smoothing_factor=0.1).train()


def computes_its_own_loss(model: nn.Module, folder: Path) -> None:
    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        logits = outputs.logits[:, :-1].flatten(0, 1)
        return nn.functional.cross_entropy(logits, labels[:, 1:].flatten())

    trainer_for(model, folder, compute_loss_func=loss).train()


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
        declined: the words of the one warning where it trains dense; empty where it trains sparsely.
        slow: whether its test takes more than about ten seconds.
    """

    title: str
    run: Callable[[nn.Module, Path], None]
    forwards: int = STEPS
    declined: str = ""
    slow: bool = False


NO_LABELS = "token_roles"

TRAINING: dict[str, TrainingRow] = {
    "accumulation": TrainingRow("`Trainer` with gradient accumulation", plain, forwards=8),
    "best_model": TrainingRow("`Trainer` that evaluates, saves and reloads the best model", reloads_the_best),
    "loraplus": TrainingRow("LoRA+ (`create_loraplus_optimizer`)", lora_plus),
    "bits_of_8": TrainingRow("8-bit optimizers (bitsandbytes)", bits_of_8),
    "accelerate": TrainingRow(
        "Accelerate's own loop (`prepare`, `accumulate`, `backward`)", accelerate_loop, forwards=4
    ),
    "sft": TrainingRow("TRL `SFTTrainer`, loss on completions", sft(), slow=True),
    "sft_packing": TrainingRow("TRL `SFTTrainer`, packing", sft(packing=True), slow=True),
    "label_smoothing": TrainingRow(
        "`label_smoothing_factor`: the labels never reach the model", smooths_labels, declined=NO_LABELS
    ),
    "compute_loss_func": TrainingRow(
        "`compute_loss_func`: the labels never reach the model", computes_its_own_loss, declined=NO_LABELS
    ),
}


@pytest.mark.parametrize("name", cases(TRAINING))
def test_a_way_to_train_is_sparse_at_every_step(name: str, tmp_path: Path, aot_eager_inductor: Any) -> None:
    row = TRAINING[name]
    model = model_for()
    before = [parameter.detach().clone() for parameter in trained(model)]
    with told() as messages, record_channels() as record:
        row.run(model, tmp_path)
    assert all(not torch.equal(now, then) for now, then in zip(trained(model), before, strict=True))
    if row.declined:
        assert len(messages) == 1 and row.declined in messages[0], messages
        assert not record
        raise NotSupportedError(row.declined)
    assert messages == []
    # TRL calls the decoder below the head by itself, so the names of its modules begin there.
    (choices,) = (found for name, found in record.items() if name.endswith(FFN))
    assert len(choices) == row.forwards


# --- What happens to a model between steps ----------------------------------------------------------------------------


def test_a_swapped_adapter_trains_on_without_a_compilation(tmp_path: Path, aot_eager_inductor: Any) -> None:
    from peft.utils.hotswap import hotswap_adapter

    model, inputs = model_for(), batch(97)
    first, _ = sparse_step(model, model, inputs)
    other = peft(lora_alpha=8)()
    with torch.no_grad():
        for parameter in trained(other):
            parameter.mul_(-1.5).add_(0.01)
    other.save_pretrained(tmp_path)  # type: ignore[operator]
    hotswap_adapter(model, str(tmp_path), adapter_name="default", torch_device="cpu")
    step, kept = sparse_step(model, model, inputs)
    assert len(aot_eager_inductor.graphs) == 1
    assert not torch.equal(step.loss, first.loss)
    eager = peft()()
    eager.load_state_dict(model.state_dict())
    assert_same_step(step, oracle_step(eager, kept, inputs), torch.float32)


def test_a_trained_model_merges_and_saves_as_any_other(tmp_path: Path, aot_eager_inductor: Any) -> None:
    from peft import PeftModel

    from support.adapters import base

    model, inputs = model_for(), batch(97)
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    for _ in range(2):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        expected = model(**inputs).logits
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    merged = model.merge_and_unload()  # type: ignore[operator]
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


def test_disabled_and_merged_adapters_run_dense_and_silent(aot_eager_inductor: Any) -> None:
    model, inputs = model_for(), batch(97)
    with told() as messages, record_channels() as record:
        with model.disable_adapter(), torch.no_grad():  # type: ignore[operator]
            disabled = model(**inputs).loss
        model.merge_adapter()  # type: ignore[operator]
        with torch.no_grad():
            merged = model(**inputs).loss
        model.unmerge_adapter()  # type: ignore[operator]
    assert messages == [] and record == {}
    assert not torch.equal(disabled, merged)
    step, kept = sparse_step(model, model, inputs)
    eager = peft()()
    eager.load_state_dict(model.state_dict())
    assert_same_step(step, oracle_step(eager, kept, inputs), torch.float32)


# --- Shapes -----------------------------------------------------------------------------------------------------------


def test_every_length_from_one_up(aot_eager_inductor: Any) -> None:
    """A single token predicts nothing: its loss is NaN, compiled or not."""
    model = peft()()
    call = torch.compile(
        model, backend="sparselora", options={"layer_sparsity": SITES, "preset": "none", "strict": True}
    )
    for length in (5, 4, 3, 2, 1):
        inputs = batch(97, rows=2, length=length, prompts=[max(length - 1, 0), length // 2])
        step, kept = sparse_step(model, call, inputs)
        if length == 1:
            assert step.loss.isnan() and train_step(model, model, inputs).loss.isnan()
            continue
        expected = oracle_step(model, kept, inputs)
        torch.testing.assert_close(step.loss, expected.loss, rtol=1e-4, atol=1e-6)
        for name, gradient in expected.gradients.items():
            torch.testing.assert_close(step.gradients[name], gradient, rtol=1e-3, atol=1e-5)
    assert len(aot_eager_inductor.graphs) <= 4


@pytest.mark.parametrize("how", ["dynamic=True", "mark_dynamic"])
def test_a_symbolic_length_from_the_first_step_on(how: str, aot_eager_inductor: Any) -> None:
    model = peft()()
    call = torch.compile(
        model,
        backend="sparselora",
        dynamic=True if how == "dynamic=True" else None,
        options={"layer_sparsity": SITES, "strict": True, "preset": "exact"},
    )
    for length in (12, 17, 9):
        inputs = batch(97, length=length, padding="right")
        if how == "mark_dynamic":
            for value in inputs.values():
                torch._dynamo.mark_dynamic(value, 1)
        step, kept = sparse_step(model, call, inputs)
        assert_same_step(step, oracle_step(model, kept, inputs), torch.float32)
    assert aot_eager_inductor.runs == [3]


def test_packed_rows_with_position_ids(aot_eager_inductor: Any) -> None:
    model, inputs = peft()(), batch(97, packed=True)
    call = torch.compile(model, backend="sparselora", options={"layer_sparsity": SITES, "strict": True})
    step, kept = sparse_step(model, call, inputs)
    assert len(kept) == len(SITES)
    assert_same_step(step, oracle_step(model, kept, inputs), torch.float32)
    gradients(model)
