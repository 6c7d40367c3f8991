"""What a calibrated recipe says of how it came about."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

__all__ = ["data_digest", "versions"]


def data_digest(batches: Sequence[Mapping[str, Any]]) -> str:
    """Return what tells the input ids and labels of some batches, and their order, from others."""
    digest = hashlib.blake2b(digest_size=16)
    for batch in batches:
        for name in ("input_ids", "labels"):
            value = batch.get(name)
            if isinstance(value, Tensor):
                digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Return the versions that a calibration was made with."""
    return {"torch": torch.__version__, "sparse_compile": version("sparse-compile")}
