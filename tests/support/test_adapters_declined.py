"""The support matrix, bases whose layers stay dense: they train as eagerly, and one warning says why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from adapter_rows import SITES, base
from models import ALL_TARGETS, batch, with_lora
from oracle import assert_same_step, told, train_step
from sweeps import sweep


@dataclass(frozen=True)
class DeclinedBaseRow:
    """A base that trains dense.

    Attributes:
        title: what the page calls it.
        build: returns a model with adapters on it.
        declined: words of the one warning.
    """

    title: str
    build: Callable[[], nn.Module]
    declined: str


def in_8_bits() -> nn.Module:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = base()
    for name, layer in list(model.named_modules()):
        if name.endswith("_proj"):
            packed = bitsandbytes.nn.Linear8bitLt(layer.in_features, layer.out_features, False, has_fp16_weights=False)
            packed.weight = bitsandbytes.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, packed)
    model.is_loaded_in_8bit = True  # type: ignore[assignment]
    return with_lora(model.to("cpu"), ALL_TARGETS)


def of_torchao(kind: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        model = base()
        if kind == "int8":
            torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), lambda _, name: name.endswith("_proj"))
        else:
            for name, layer in model.named_modules():
                if name.endswith("_proj"):
                    packed = torchao.to_nf4(layer.weight.data, 64, 4)
                    layer.weight = nn.Parameter(packed, requires_grad=False)
        return with_lora(model, ALL_TARGETS)

    return build


DECLINED_BASES: dict[str, DeclinedBaseRow] = {
    "bits_of_8": DeclinedBaseRow("a base in 8 bits (bitsandbytes)", in_8_bits, "its weight is stored in 8 bits"),
    "torchao_int8": DeclinedBaseRow(
        "a base in 8 bits (torchao; tested where that is installed)",
        of_torchao("int8"),
        "its weight is a tensor of a class of its own (Int8Tensor",
    ),
    "torchao_nf4": DeclinedBaseRow(
        "a base in NF4 (torchao; tested where that is installed)",
        of_torchao("nf4"),
        "its weight is a tensor of a class of its own (NF4Tensor",
    ),
}


@pytest.mark.parametrize("name", sweep(DECLINED_BASES, *(name for name in DECLINED_BASES if name != "bits_of_8")))
def test_a_base_that_is_declined_trains_dense_and_says_so(name: str, aot_eager_inductor: Any) -> None:
    row, inputs = DECLINED_BASES[name], batch(97)
    model = row.build()
    call = torch.compile(model, backend="sparselora", options={"preset": "exact", "layer_sparsity": SITES})
    with told() as messages:
        for _ in range(2):
            step = train_step(model, call, inputs)
    # Another line says that no site has the names asked for.
    (message,) = (each for each in messages if "so training runs dense" in each)
    assert row.declined in message and "to have it sparse" in message
    assert not any(aot_eager_inductor.sparse)
    assert_same_step(step, train_step(model, model, inputs), torch.float32)
