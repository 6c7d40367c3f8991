"""Merge the adapters of a pruned model without filling its zeros (LoRS, arXiv 2501.08582)."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from sparse_compile.compiler.peft_support import lora_layers
from sparse_compile.kernels.dtypes import at_least_fp32
from sparse_compile.kernels.masked_linear.pattern import zero_fraction
from sparse_compile.options.config import DEFAULT_MASK_THRESHOLD
from sparse_compile.torch_private.modules import original_module


def merge_masked(model: nn.Module, threshold: float = DEFAULT_MASK_THRESHOLD) -> nn.Module:
    """Merge the active LoRA adapters of a PEFT model into its weights; every zero of a pruned weight stays zero.

    A weight of which at least `threshold` is zero becomes `(W + s B A) * (W != 0)`, which is what
    `preserve_weight_mask` trained; any other becomes `W + s B A`. Both are summed in fp32 at least and rounded to the
    weight's dtype once.

    Args:
        model: a model from `peft.get_peft_model`, compiled or not. Its weights are changed in place.
        threshold: fraction of zeros, in (0, 1], from which on a weight counts as pruned: the option `mask_threshold`
            that the model was trained with.

    Returns:
        The plain model without adapters, which saves as a plain checkpoint. A weight that is 2:4 goes into
        `torch.sparse.to_sparse_semi_structured`.

    Raises:
        ValueError: the model has no adapters, or a layer cannot be merged so; nothing has been changed then.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be in (0, 1], got {threshold}")
    model = original_module(model)
    layers = lora_layers(model)
    if not layers or not hasattr(model, "unload"):
        raise ValueError("merge_masked takes a model from peft.get_peft_model with LoRA adapters; this one has none")
    owners = _owners(model)
    for name, layer in layers.items():
        reason = _reason(layer, owners)
        if reason:
            raise ValueError(f"{name} cannot be merged: {reason}")
    with torch.no_grad():
        for layer in layers.values():
            weight = layer.get_base_layer().weight
            weight.copy_(_merged(weight, layer, threshold))
    plain: nn.Module = cast("Any", model).unload()
    return plain


def _owners(model: nn.Module) -> dict[int, int]:
    """Count, by the identity of a parameter, the modules that hold it."""
    counts: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    return counts


def _reason(layer: Any, owners: dict[int, int]) -> str:
    weight = layer.get_base_layer().weight
    if layer.merged:
        return "its adapters are merged already, which has filled its zeros"
    if not weight.is_floating_point():
        return "its weight is quantised"
    if owners.get(id(weight), 1) > 1:
        return "its weight is tied to another layer, which would change with it"
    if any(layer.use_dora.get(name) for name in layer.active_adapters):
        return "its adapter is weight-decomposed (DoRA)"
    if any(layer.lora_bias.get(name) for name in layer.active_adapters):
        return "its adapter has a bias"
    return ""


def _merged(weight: Tensor, layer: Any, threshold: float) -> Tensor:
    from peft.tuners.lora import Linear

    merged = weight.to(at_least_fp32(weight))
    is_linear = isinstance(layer, Linear)
    for name in layer.active_adapters:
        if is_linear and name in layer.lora_A:
            # Not PEFT's own, which rounds B A to the dtype of the adapter.
            a, b = (factor[name].weight.to(merged.dtype) for factor in (layer.lora_A, layer.lora_B))
            left, right = (a.t(), b.t()) if layer.fan_in_fan_out else (b, a)
            merged = torch.addmm(merged, left, right, alpha=layer.scaling[name])
        elif name in layer.lora_A or name in getattr(layer, "lora_embedding_A", ()):
            merged = merged + layer.get_delta_weight(name).to(merged.dtype)
    return merged.masked_fill(weight == 0, 0) if zero_fraction(weight) >= threshold else merged
