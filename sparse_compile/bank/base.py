"""What a bank knows of the model that its adapters change: which one it is, its vocabulary, where its tokens lie."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparse_compile.bank.errors import BankError
from sparse_compile.bank.signs import signs
from sparse_compile.predictor.weight_state import fingerprint

__all__ = ["DIRECTIONS", "Base", "read_base"]

DIRECTIONS = 32
"""Random directions on which the embeddings of tokens are laid out; a sliced distance errs by about 1/sqrt of it."""


@dataclass(frozen=True, eq=False)
class Base:
    """A base model, by its folder.

    Attributes:
        fingerprint: 32 hexadecimal digits that tell its weights from those of another model, in bf16 or fp32 alike.
        name: of the folder.
        vocabulary: rows of its input embedding.
        points: (vocabulary, 32), fp32: the input embeddings on random directions; None where they are not found, or
            were not asked for.
        shapes: of each matrix, by the path of its layer.
    """

    fingerprint: str
    name: str
    vocabulary: int
    points: Tensor | None
    shapes: Mapping[str, tuple[int, ...]]


def read_base(folder: Path, *, ground: bool = False) -> Base:
    """Read what a bank needs of a model folder: a few elements of each weight, and if need be the input embedding.

    Args:
        folder: as `save_pretrained` writes it, with `config.json` and `*.safetensors`.
        ground: whether to lay the input embedding out, which reads all of it.

    Raises:
        BankError: it is no such folder, or a file in it is damaged.
    """
    vocabulary = _vocabulary(folder)
    with _tensors(folder) as tensors:
        names = sorted(tensors)
        weights = {name: tensors[name].get_tensor(name) for name in names}
        identity = fingerprint(weights[name] for name in names)
        found = [each for name, each in weights.items() if _is_input_embedding(name, each, vocabulary)]
        points = _laid_out(found[0]) if found and ground else None
        shapes = {name.removesuffix(".weight"): tuple(each.shape) for name, each in weights.items() if each.dim() == 2}
    return Base(identity, folder.resolve().name, vocabulary, points, shapes)


def _vocabulary(folder: Path) -> int:
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        nested = config.get("text_config")
        size = config.get("vocab_size") or (nested or {}).get("vocab_size")
    except (OSError, ValueError, AttributeError) as error:
        raise BankError(f"{file} cannot be read ({error}); the base is a folder that save_pretrained wrote") from None
    if not isinstance(size, int) or size < 1:
        raise BankError(f"{file} has no vocab_size; the base is the folder of a language model")
    return size


@contextmanager
def _tensors(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield for each tensor of a model folder the open file that holds it."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise BankError(f"{folder} has no *.safetensors; save the base with model.save_pretrained(folder)")
    with ExitStack() as stack:
        found: dict[str, Any] = {}
        for file in files:
            try:
                opened = stack.enter_context(safe_open(file, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise BankError(f"{file} is damaged ({error}); copy the base model again") from None
            found.update(dict.fromkeys(opened.keys(), opened))
        yield found


def _is_input_embedding(name: str, weight: Tensor, vocabulary: int) -> bool:
    is_input = any(part in name for part in ("embed_tokens", "wte", "embed_in", "word_embeddings"))
    return is_input and weight.dim() == 2 and weight.shape[0] >= vocabulary


def _laid_out(embedding: Tensor) -> Tensor:
    directions = signs("directions", embedding.shape[1], DIRECTIONS) / embedding.shape[1] ** 0.5
    return torch.cat([rows.float() @ directions for rows in torch.split(embedding, 4096)])
