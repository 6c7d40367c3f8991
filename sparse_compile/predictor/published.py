"""Read the predictor factors that a SparseLoRA release publishes."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load as safetensors_load

from sparse_compile.options.release import FACTORS_FILE
from sparse_compile.predictor.svd import (
    LowRankFactors,
    NonFiniteWeight,
)


def load_upstream_factors(path: str | os.PathLike[str]) -> dict[str, LowRankFactors]:
    """Read the factors of a SparseLoRA release: for each layer ``<layer>.w1`` (in, r) and ``<layer>.w2`` (r, out).

    Args:
        path: ``model.safetensors``, or the folder that holds it.

    Returns:
        Layer name (``model.layers.17.mlp.gate_proj``) to its factors, in the dtype of the file, on the CPU.

    Raises:
        ValueError: No such file, not of this kind, or a factor that is missing, misshapen or not finite (named).
    """
    file = Path(path)
    file = file / FACTORS_FILE if file.is_dir() else file
    try:
        tensors = safetensors_load(file.read_bytes())
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from error
    except SafetensorError as error:
        raise ValueError(f"{file} is not a safetensors file, or damaged: {error}") from error
    layers = set()
    for key, tensor in tensors.items():
        layer, _, part = key.rpartition(".")
        if part not in ("w1", "w2") or not layer:
            raise ValueError(f"{file}: {key!r} is no predictor factor (<layer>.w1 or <layer>.w2)")
        if not bool(tensor.isfinite().all()):
            raise NonFiniteWeight(f"{file}: {key} holds NaN or infinity")
        other = f"{layer}.{'w2' if part == 'w1' else 'w1'}"
        if other not in tensors:
            raise ValueError(f"{file}: {key} is there, {other} is missing")
        layers.add(layer)
    if not layers:
        raise ValueError(f"{file} holds no predictor factors")
    factors = {}
    for layer in sorted(layers):
        try:
            factors[layer] = LowRankFactors(tensors[f"{layer}.w1"], tensors[f"{layer}.w2"])
        except ValueError as error:
            raise ValueError(f"{file}: {layer}.w1 and {layer}.w2: {error}") from error
    return factors
