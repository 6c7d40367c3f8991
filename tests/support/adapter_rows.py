"""The adapters of the support matrix: two blocks of a tiny Llama, the first one sparse, with adapters of every kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from decoder import fill_normal
from models import ALL_TARGETS, ATTENTION_TARGETS, FFN_TARGETS, tiny_llama

SITES = {"layers.0.mlp": 0.5, "layers.0.self_attn": 0.5}


@dataclass(frozen=True)
class AdapterRow:
    """An adapter of the matrix.

    Attributes:
        title: what the page calls it.
        build: returns a model with it, in training mode.
    """

    title: str
    build: Callable[[], nn.Module]


def base(**options: Any) -> nn.Module:
    """Return the model that adapters are put on."""
    return tiny_llama(layers=2, hidden=64, ffn=128, **options)


def trained_for_a_while(model: nn.Module, seed: int = 1) -> nn.Module:
    """Give every trained factor and bias that starts at zero other values, or half of the gradients would vanish."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            fill_normal(parameter, 0.1, generator)
    return model.train()


def peft(targets: tuple[str, ...] = ALL_TARGETS, bias_in_base: bool = False, **options: Any) -> Callable[[], nn.Module]:
    """Return what builds a model with PEFT's adapters."""

    def build() -> nn.Module:
        from peft import LoraConfig, get_peft_model

        settings = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = get_peft_model(base(bias=bias_in_base), LoraConfig(target_modules=list(targets), **settings))
        return trained_for_a_while(model)

    return build


def two_active() -> nn.Module:
    from peft import LoraConfig

    model = peft()()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "gate_proj", "down_proj"]))  # type: ignore[operator]
    model.base_model.set_adapter(["default", "second"])  # type: ignore[operator, union-attr]
    return trained_for_a_while(model, seed=2)


ADAPTERS: dict[str, AdapterRow] = {
    "attention": AdapterRow("adapters on q, k, v and o alone", peft(ATTENTION_TARGETS)),
    "mlp": AdapterRow("adapters on gate, up and down alone", peft(FFN_TARGETS)),
    "all": AdapterRow("adapters on all seven projections", peft()),
    "one_layer": AdapterRow("adapters in some blocks (`layers_to_transform`)", peft(layers_to_transform=[1])),
    "lora_bias": AdapterRow("bias in B (`lora_bias=True`)", peft(bias_in_base=True, lora_bias=True)),
    "bias_lora_only": AdapterRow(
        'trained biases of the adapted layers (`bias="lora_only"`)', peft(bias_in_base=True, bias="lora_only")
    ),
    "ranks": AdapterRow(
        "rank and alpha patterns",
        peft(rank_pattern={"q_proj": 2, "layers.0.mlp.up_proj": 8}, alpha_pattern={"down_proj": 16}),
    ),
    "modules_to_save": AdapterRow(
        '`modules_to_save=["lm_head"]`: the head is trained in full', peft(modules_to_save=["lm_head"])
    ),
    "rslora": AdapterRow("rsLoRA", peft(use_rslora=True)),
    "pissa": AdapterRow("PiSSA initialisation", peft(init_lora_weights="pissa")),
    "olora": AdapterRow("OLoRA initialisation", peft(init_lora_weights="olora")),
    "two_active": AdapterRow("two active adapters", two_active),
    "dora": AdapterRow("DoRA", peft(use_dora=True)),
}
