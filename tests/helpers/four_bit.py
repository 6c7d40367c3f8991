"""Models whose frozen layers are stored in 4 bits by bitsandbytes, and the same models with what is stored, dense."""

from __future__ import annotations

from typing import Any

import bitsandbytes
import torch
from torch import nn

from models import tiny_llama


def quantized(model: nn.Module, *, nested: bool = False, quant_type: str = "nf4", dtype: torch.dtype | None = None,
              blocksize: int = 64, storage: torch.dtype = torch.uint8) -> nn.Module:  # fmt: skip
    """Store every projection of a model in 4 bits, in place, as `load_in_4bit=True` does.

    Args:
        model: any model whose projections are called `..._proj`.
        nested: whether the scales are quantised too (`bnb_4bit_use_double_quant`).
        quant_type: `"nf4"` or `"fp4"`.
        dtype: what the layers compute in (`bnb_4bit_compute_dtype`); None leaves it to their input.
        blocksize: elements that share a scale.
        storage: dtype of the packed data (`bnb_4bit_quant_storage`).
    """
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name.endswith("_proj"):
            packed = bitsandbytes.nn.Linear4bit(
                layer.in_features, layer.out_features, layer.bias is not None, dtype, nested, quant_type, storage
            )
            packed.weight = bitsandbytes.nn.Params4bit(
                layer.weight.data, False, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type,
                quant_storage=storage, module=packed,
            )  # fmt: skip
            packed.bias = layer.bias
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, packed)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
    return model.to("cpu")


def dequantized(model: nn.Module, plain: nn.Module) -> nn.Module:
    """Return `plain`, a model of the same structure, with what the projections of a quantised one really hold."""
    for name, layer in model.named_modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            target = plain.get_submodule(name)
            dense = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            assert isinstance(target, nn.Linear)
            target.weight.data = dense.to(target.weight.dtype)
    return plain


def pair(layers: int = 2, **how: Any) -> tuple[nn.Module, nn.Module]:
    """Return a quantised Llama and its dense twin."""
    sizes = {"layers": layers, "hidden": 64, "ffn": how.pop("ffn", 128)}
    model = quantized(tiny_llama(**sizes), **how)
    return model, dequantized(model, tiny_llama(**sizes))
