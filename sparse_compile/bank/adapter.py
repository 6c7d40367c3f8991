"""A LoRA adapter as PEFT saves it: read, checked, and seen layer by layer without loading the rest."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparse_compile.bank.errors import BankError

__all__ = ["CONFIG", "WEIGHTS", "Adapter", "Layer", "factor_key", "open_adapter"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_PREFIX = "base_model.model."
_KEY = re.compile(rf"{re.escape(_PREFIX)}(?P<layer>.+)\.lora_(?P<factor>[AB])\.weight")

_UNDERSTOOD = {
    *("peft_type", "task_type", "peft_version", "base_model_name_or_path", "revision", "auto_mapping"),
    *("inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "fan_in_fan_out", "bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
    # Where they start changes nothing of what B A is after training, except as `_REASONS` has it.
    *("init_lora_weights", "eva_config", "lora_ga_config"),
    # They say nothing without the option that they belong to.
    *("megatron_core", "qalora_group_size", "runtime_config"),
}
"""Entries of a configuration that are read, or that do not matter. Any other must be empty or false."""

_REASONS = {
    "use_dora": "it is weight-decomposed (DoRA): its change of a weight is no product B A",
    "use_qalora": "it is quantised (QALoRA)",
    "loftq_config": "LoftQ has quantised its base: it changes other weights than the bank's",
    "lora_bias": "its products have a bias",
    "modules_to_save": "it holds whole layers, which are no product B A",
    "trainable_token_indices": "it holds trained tokens, which are no product B A",
    "layer_replication": "it repeats layers of the base",
    "target_parameters": "it changes parameters that are no linear layer",
    "alora_invocation_tokens": "it acts on a part of the tokens alone (aLoRA)",
}

_OTHER_BASE = ("pissa", "olora", "corda", "loftq")
"""Starts that take the adapter out of the base's weights, so that it changes other weights than the bank's."""


@dataclass(frozen=True)
class Layer:
    """Sizes of the adapter of one linear layer.

    Attributes:
        rank: r.
        inputs: columns of A (r, in).
        outputs: rows of B (out, r).
        scale: s of s B A.
    """

    rank: int
    inputs: int
    outputs: int
    scale: float


class Adapter:
    """An open adapter. Its factors are views of the mapped file, so the memory that they take is the system's cache.

    Attributes:
        folder: where it is.
        config: of PEFT, as it stands in the file.
        layers: by path in the base model.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], layers: Mapping[str, Layer], file: Any) -> None:
        self.folder = folder
        self.config = config
        self.layers = layers
        self._file = file

    def factors(self, layer: str) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r) of a layer, in the dtype of the file."""
        return self._file.get_tensor(factor_key(layer, "A")), self._file.get_tensor(factor_key(layer, "B"))

    @property
    def largest_rank(self) -> int:
        """The largest rank of a layer."""
        return max(each.rank for each in self.layers.values())


def open_adapter(folder: Path) -> Adapter:
    """Open the folder of an adapter; no factor is read yet.

    Raises:
        BankError: it is no LoRA adapter of linear layers in safetensors, or a file is damaged. The message says which.
    """
    config = _config(folder)
    reason = _declined(config)
    if reason:
        raise BankError(f"the adapter {folder} cannot be in a bank: {reason}")
    file = folder / WEIGHTS
    if not file.is_file():
        pickled = sorted(each.name for each in folder.glob("adapter_model.*"))
        found = f"; {pickled[0]} is not read, because pickles run code" if pickled else ""
        raise BankError(f"{folder} has no {WEIGHTS}{found}; save it with model.save_pretrained(folder)")
    try:
        opened: Any = safe_open(file, framework="pt")
        slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise BankError(f"{file} is damaged ({error}); save the adapter again") from None
    return Adapter(folder, config, _layers(folder, config, slices), opened)


def _config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BankError(f"{file} cannot be read ({error}); an adapter is a folder that PEFT saved") from None
    if not isinstance(config, dict):
        raise BankError(f"{file} holds no configuration; an adapter is a folder that PEFT saved")
    return config


def _declined(config: Mapping[str, Any]) -> str:
    if config.get("peft_type") != "LORA":
        return f"its kind is {config.get('peft_type')}, and only LORA is a product B A"
    for name, reason in _REASONS.items():
        if config.get(name):
            return reason
    if config.get("bias", "none") != "none":
        return f"it trains biases (bias={config['bias']!r})"
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(_OTHER_BASE):
        return f"it started as {start}, which changed the base's weights; convert it to plain LoRA when you save it"
    for name, value in config.items():
        if value and name not in _UNDERSTOOD:
            return f"its option {name} is set, which a bank does not know"
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        return f"r={rank!r} and lora_alpha={alpha!r} are no rank and scale"
    return ""


def _layers(folder: Path, config: Mapping[str, Any], slices: Mapping[str, Any]) -> dict[str, Layer]:
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, part in slices.items():
        shape, dtype = part.get_shape(), part.get_dtype()
        match = _KEY.fullmatch(key)
        if match is None or len(shape) != 2:
            raise BankError(
                f"the adapter {folder} cannot be in a bank: {key} {tuple(shape)} is no factor of a linear layer"
            )
        if dtype not in ("F16", "BF16", "F32", "F64"):
            raise BankError(f"the adapter {folder} cannot be in a bank: {key} is {dtype}, which is quantised")
        shapes.setdefault(match["layer"], {})[match["factor"]] = tuple(shape)
    if not shapes:
        raise BankError(f"{folder / WEIGHTS} holds no factor; save the adapter again")
    layers = {}
    for name in sorted(shapes):
        a, b = (shapes[name].get(factor, (0, 0)) for factor in "AB")
        if not (a[0] == b[1] > 0 and a[1] > 0 and b[0] > 0):
            raise BankError(
                f"{folder / WEIGHTS}: A {a} and B {b} of {name} do not fit together; save the adapter again"
            )
        layers[name] = Layer(a[0], a[1], b[0], _scale(name, a[0], config))
    return layers


def _scale(layer: str, rank: int, config: Mapping[str, Any]) -> float:
    """Return s of s B A as PEFT computes it: alpha / r, or alpha / sqrt(r)."""
    patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
    alpha = float(patterns.get(_pattern_of(layer, patterns), config["lora_alpha"]))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _pattern_of(layer: str, patterns: Iterable[str]) -> str:
    """Return the first pattern that ends a layer's path, as PEFT looks it up."""
    return next((each for each in patterns if re.match(rf"(.*\.)?({each})$", layer)), layer)


def factor_key(layer: str, factor: str) -> str:
    """Return the name that PEFT gives a factor, "A" or "B", of a layer."""
    return f"{_PREFIX}{layer}.lora_{factor}.weight"
