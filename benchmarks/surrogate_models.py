"""The models of `surrogate_quality.py`, and how they train.

A model comes from a folder, or is a small one of another architecture that is pre-trained here, once for each settings.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from predictor_text import Batch, Example, pad
from torch import nn

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt_neox": {"intermediate_size": 1024},
    "qwen2": {"intermediate_size": 768, "num_key_value_heads": 4},
}
"""By model type, its sizes beside `SIZES`. Each has 7 to 8 million parameters with a vocabulary of 4096."""

SIZES = {
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
PRETRAINING = {"batch_size": 16, "lr": 2e-3, "rise": 50, "seed": 0}

_LLAMA = (("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj"))
_GPT_NEOX = (("query_key_value", "dense"), ("dense_h_to_4h", "dense_4h_to_h"))


def target_modules(model_type: str, targets: str) -> list[str]:
    """Return the names of the layers with adapters.

    Args:
        model_type: of the model's configuration; what is not known here has the names of a Llama.
        targets: `"attention"` or `"all"`.
    """
    attention, ffn = _GPT_NEOX if model_type == "gpt_neox" else _LLAMA
    return [*attention] if targets == "attention" else [*attention, *ffn]


def load(folder: Path) -> nn.Module:
    """Load the model of a folder, to train it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.config.use_cache = False
    return model


def pretrained(architecture: str, like: Any, examples: Sequence[Example], steps: int, cache: Path) -> Path:
    """Return the folder of a model that is pre-trained on whole records; it is made where the cache has none.

    Args:
        architecture: of `ARCHITECTURES`.
        like: configuration of the model with the same tokenizer.
        examples: questions and answers; all of their tokens are labelled.
        steps: optimizer steps.
        cache: folder of such folders, each named for all that its model depends on.
    """
    names = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
    sizes = {**SIZES, **ARCHITECTURES[architecture], **{name: getattr(like, name) for name in names}}
    key = hashlib.sha256(repr((sizes, PRETRAINING, examples)).encode()).hexdigest()[:12]
    folder = cache / f"{architecture}-{steps}-{key}"
    if not folder.is_dir():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(PRETRAINING["seed"])
            config = transformers.AutoConfig.for_model(architecture, **sizes)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _pretrain(model, examples, steps)
        _save(model, folder)
    return folder


def _pretrain(model: nn.Module, examples: Sequence[Example], steps: int) -> None:
    whole = [(question[:1], [*question[1:], *answer]) for question, answer in examples]
    order = random.Random(PRETRAINING["seed"])
    size = int(PRETRAINING["batch_size"])
    left: list[Example] = []
    batches = []
    for _ in range(steps):
        left = left if len(left) >= size else order.sample(whole, len(whole))
        batches.append(left[:size])
        left = left[size:]
    peak, rise = PRETRAINING["lr"], int(PRETRAINING["rise"])
    losses, _ = descend(model.train(), list(model.parameters()), batches, pad, peak, rise)
    print(f"pre-trained for {steps} steps: loss {statistics.fmean(losses[-20:]):.4f}", flush=True)


def _save(model: Any, folder: Path) -> None:
    """Write a folder, whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".unfinished-"))
    try:
        model.save_pretrained(unfinished)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def descend(
    call: Callable[..., Any],
    trained: Sequence[nn.Parameter],
    batches: Sequence[Sequence[Example]],
    padded: Callable[[Sequence[Example]], Batch],
    lr: float,
    rise: int = 5,
) -> tuple[list[float], list[float]]:
    """Take a step of AdamW for each batch; return the losses of the steps and their seconds.

    Args:
        call: a model, compiled or not, that returns its loss.
        trained: its parameters to train.
        batches: the records of each step.
        padded: makes a batch of records.
        lr: peak learning rate; it falls linearly to zero.
        rise: steps over which it rises.
    """
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    losses, seconds = [], []
    for step, batch in enumerate(batches):
        inputs = vars(padded(batch))
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / rise) * (1 - step / len(batches))
        start = time.perf_counter()
        loss = call(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        seconds.append(time.perf_counter() - start)
    return losses, seconds
