"""Pruned models and the ways to train their adapters, for `lors.py`.

Prunings: by magnitude, and Wanda (arXiv 2306.11695: |W| times the norm of the input). Masking by autograd is that of
SQFT (arXiv 2410.03750), written here as one writes it in PyTorch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The layers that are pruned and carry adapters."""

PATTERNS = ("50%", "2:4")
CRITERIA = ("magnitude", "wanda")


# --- Pruning ----------------------------------------------------------------------------------------------------------


def prunable(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers with a name of `TARGETS`."""
    named = model.named_modules()
    return {name: module for name, module in named if name.rpartition(".")[2] in TARGETS}  # type: ignore[misc]


@torch.no_grad()
def prune(model: nn.Module, criterion: str, pattern: str, calibration: Sequence[Mapping[str, Tensor]] = ()) -> None:
    """Set half of the entries of each prunable layer to zero.

    Args:
        model: changed in place.
        criterion: of `CRITERIA`. By magnitude the smallest entries of a layer go; by Wanda the smallest of each row,
            measured as |W_ij| ||x_j||_2, with the inputs x that the layer has before anything is pruned.
        pattern: of `PATTERNS`; `"2:4"` compares the entries of each four consecutive inputs instead.
        calibration: batches, with an `attention_mask`, that Wanda takes the inputs of.
    """
    norms = _input_norms(model, calibration) if criterion == "wanda" else {}
    for name, layer in prunable(model).items():
        score = layer.weight.abs() * norms.get(name, 1.0)
        groups = score.reshape(-1, 4) if pattern == "2:4" else score if norms else score.reshape(1, -1)
        least = groups.argsort(1)[:, : groups.shape[1] // 2]
        layer.weight.mul_(torch.ones_like(groups).scatter_(1, least, 0.0).reshape(score.shape))


def _input_norms(model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the L2 norm of each input channel of each prunable layer, over tokens that are not padding."""
    squares: dict[str, Tensor] = {}
    handles = []
    tokens = torch.empty(0)

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            squares[name] = squares.get(name, 0) + args[0][tokens].square().sum(0)

        return hook

    for name, layer in prunable(model).items():
        handles.append(layer.register_forward_pre_hook(watch(name)))
    for batch in batches:
        tokens = batch["attention_mask"].bool()
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for handle in handles:
        handle.remove()
    return {name: total.sqrt() for name, total in squares.items()}


# --- Adapters ---------------------------------------------------------------------------------------------------------


class MaskedByAutograd(nn.Module):
    """A pruned layer with its adapter as `x ((W + s B A) * mask)' + bias`, left to autograd.

    Args:
        layer: PEFT's; weights and factors are shared with it.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        base, name = layer.get_base_layer(), layer.active_adapters[0]
        self.weight, self.bias, self.scale = base.weight, base.bias, layer.scaling[name]
        self.a, self.b = layer.lora_A[name].weight, layer.lora_B[name].weight
        self.register_buffer("mask", base.weight.detach() != 0)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.weight + self.scale * (self.b @ self.a)) * self.mask, self.bias)


def masked_by_autograd(model: nn.Module) -> nn.Module:
    """Return a copy of a PEFT model, sharing all parameters, whose adapted layers are `MaskedByAutograd`."""
    shared = [*model.parameters(), *model.buffers()]
    copied = copy.deepcopy(model, memo={id(each): each for each in shared})
    layers = {name: module for name, module in copied.named_modules() if isinstance(module, LoraLayer)}
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(copied.get_submodule(parent), child, MaskedByAutograd(layer))
    return copied


# --- What is saved for the backward -----------------------------------------------------------------------------------


@dataclass
class SavedBytes:
    """Bytes of tensors that a forward saved for its backward, each storage once.

    Attributes:
        parameters: of parameters, which live anyway.
        others: of all else: activations, masks, masked weights.
    """

    parameters: int = 0
    others: int = 0


@contextmanager
def saved_tensors(model: nn.Module) -> Iterator[SavedBytes]:
    """Count what a forward saves; read the counts when the context has closed."""
    own = {each.untyped_storage().data_ptr() for each in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    found = SavedBytes()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found
    found.parameters = sum(size for pointer, size in storages.items() if pointer in own)
    found.others = sum(size for pointer, size in storages.items() if pointer not in own)
