"""What PEFT saves is read as PEFT means it, and what is no sum of products B A is declined with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from banks import LAYERS, Made
from models import tiny_llama, with_lora
from sparse_compile.bank.adapter import open_adapter
from sparse_compile.bank.errors import BankError

UP = "model.layers.0.mlp.up_proj"


def test_layers_have_their_sizes(made: Made) -> None:
    adapter = open_adapter(made(rank=3))
    assert {name: (layer.outputs, layer.inputs) for name, layer in adapter.layers.items()} == LAYERS
    assert adapter.largest_rank == 3
    a, b = adapter.factors(UP)
    assert a.shape == (3, 8) and b.shape == (12, 3)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 8 / 2),
        ({"alpha_pattern": {"up_proj": 2}}, 0.5),
        ({"alpha_pattern": {"down_proj": 2}}, 2.0),
    ],
)
def test_scales_are_those_of_peft(made: Made, config: dict[str, Any], scale: float) -> None:
    assert open_adapter(made(rank=4, **config)).layers[UP].scale == pytest.approx(scale)


@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_saves_has_the_products_that_peft_computes(tmp_path: Path, rslora: bool) -> None:
    peft = pytest.importorskip("peft")
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"0.self_attn.v_proj": 5}}
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], use_rslora=rslora, **patterns)
    model = peft.get_peft_model(tiny_llama(layers=2), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "saved")
    adapter = open_adapter(tmp_path / "saved")
    assert len(adapter.layers) == 4
    for name, layer in adapter.layers.items():
        a, b = adapter.factors(name)
        torch.testing.assert_close(
            layer.scale * (b @ a), model.get_submodule(f"base_model.model.{name}").get_delta_weight("default")
        )


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"peft_type": "IA3"}, "its kind is IA3"),
        ({"use_dora": True}, "DoRA"),
        ({"use_qalora": True}, "QALoRA"),
        ({"loftq_config": {"loftq_bits": 4}}, "LoftQ"),
        ({"bias": "all"}, "biases"),
        ({"lora_bias": True}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "whole layers"),
        ({"trainable_token_indices": [1]}, "tokens"),
        ({"target_parameters": ["experts"]}, "no linear layer"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base's weights"),
        ({"kasa_config": {"x": 1}}, "kasa_config"),
        ({"of_a_later_peft": "yes"}, "of_a_later_peft"),
        ({"r": 0}, "no rank"),
        ({"lora_alpha": "8"}, "no rank and scale"),
    ],
)
def test_other_kinds_are_declined_with_the_reason(made: Made, config: dict[str, Any], reason: str) -> None:
    with pytest.raises(BankError, match=f"cannot be in a bank: .*{reason}"):
        open_adapter(made(**config))


def test_dora_as_peft_saves_it_is_declined(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    with_lora(tiny_llama(layers=1), dora=True).save_pretrained(tmp_path / "dora")
    with pytest.raises(BankError, match="DoRA"):
        open_adapter(tmp_path / "dora")


@pytest.mark.parametrize(
    ("name", "tensor", "reason"),
    [
        ("lora_embedding_A", torch.zeros(2, 8), "no factor of a linear layer"),
        (f"base_model.model.{UP}.lora_magnitude_vector.weight", torch.zeros(8), "no factor of a linear layer"),
        ("base_model.model.conv.lora_A.weight", torch.zeros(2, 3, 1, 1), "no factor of a linear layer"),
        ("base_model.model.x.lora_A.weight", torch.zeros(2, 3, dtype=torch.int8), "quantised"),
        ("base_model.model.x.lora_A.weight", torch.zeros(2, 3), "do not fit together"),
        (f"base_model.model.{UP}.lora_A.weight", torch.zeros(3, 8), "do not fit together"),
    ],
)
def test_other_tensors_are_declined(made: Made, name: str, tensor: torch.Tensor, reason: str) -> None:
    with pytest.raises(BankError, match=reason):
        open_adapter(made(tensors={name: tensor}))


def test_pickles_are_not_read(made: Made) -> None:
    folder = made()
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    with pytest.raises(BankError, match=r"adapter_model.bin is not read, because pickles run code.*save_pretrained"):
        open_adapter(folder)


def test_damaged_files_are_named(made: Made, tmp_path: Path) -> None:
    folder = made()
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(BankError, match=r"adapter_model\.safetensors is damaged"):
        open_adapter(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(BankError, match=r"adapter_config\.json cannot be read"):
        open_adapter(folder)
    with pytest.raises(BankError, match=r"adapter_config\.json cannot be read"):
        open_adapter(tmp_path / "nowhere")
    empty = made()
    save_file({}, empty / "adapter_model.safetensors")
    with pytest.raises(BankError, match="holds no factor"):
        open_adapter(empty)
    (empty / "adapter_config.json").write_text(json.dumps([1]))
    with pytest.raises(BankError, match="no configuration"):
        open_adapter(empty)
