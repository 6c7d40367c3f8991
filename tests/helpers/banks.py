"""Write a tiny base model, and adapters for it, as `save_pretrained` would."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor

from sparse_compile.bank.adapter_bank import AdapterBank

VOCABULARY, HIDDEN, FFN = 20, 8, 12
LAYERS = {"model.layers.0.mlp.up_proj": (FFN, HIDDEN), "model.layers.0.mlp.down_proj": (HIDDEN, FFN)}
"""By path: (out, in)."""

Made = Callable[..., Path]
"""From rank, seed and changes of the configuration to the folder of an adapter."""


def write_base(folder: Path, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    sizes = {**LAYERS, "model.embed_tokens": (VOCABULARY, HIDDEN)}
    weights = {f"{name}.weight": torch.randn(size, generator=generator) for name, size in sizes.items()}
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"vocab_size": VOCABULARY}))
    return folder


def write_adapter(
    folder: Path,
    rank: int = 2,
    seed: int = 0,
    layers: Mapping[str, tuple[int, int]] = LAYERS,
    tensors: Mapping[str, Tensor] | None = None,
    **config: Any,
) -> Path:
    """Write an adapter of normal factors; a configuration's entry is what a keyword says."""
    generator = torch.Generator().manual_seed(seed)
    factors: dict[str, Tensor] = {}
    for name, (outputs, inputs) in layers.items():
        factors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator)
        factors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({**factors, **(tensors or {})}, folder / "adapter_model.safetensors")
    plain = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none", "target_modules": sorted(layers)}
    (folder / "adapter_config.json").write_text(json.dumps({**plain, **config}))
    return folder


def add_many(folder: Path, base: Path, adapter: Path, name: str, count: int, go: Any, done: Any) -> None:
    """Add an adapter again and again under new names, once `go` is set, and count in `done` what was added."""
    bank = AdapterBank(folder)
    go.wait()
    for i in range(count):
        bank.add(f"{name}-{i}", adapter, [[1, i % VOCABULARY]], base=base)
        done.value = i + 1


def die_at(place: str, folder: Path, base: Path, adapter: Path) -> None:
    """Add an adapter, and die at the first call of a function as by `kill -9`, with nothing cleaned up."""
    with mock.patch(place, side_effect=lambda *_, **__: os._exit(9)):
        AdapterBank(folder).add("a", adapter, [[1]], base=base)
