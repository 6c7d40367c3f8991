"""The support matrix, what may change between two steps: the next step is that of a fresh compilation."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from models import ALL_TARGETS, ATTENTION_TARGETS, Fp64Decoder, batch, fp64_decoder, gradients, with_lora
from sparse_compile.kernels.channel_selection import record_channels
from sweeps import sweep

SITES = {"layers.0.mlp": 0.5, "layers.0.self_attn": 0.5}
OPTIONS: dict[str, dict[str, Any]] = {
    "sparse": {"preset": "none", "layer_sparsity": SITES, "start_step": 0},
    "exact": {"preset": "exact"},
    "LoRS": {"preset": "exact", "preserve_weight_mask": "auto"},
}


class Change(NamedTuple):
    """Something that changes between two steps.

    Attributes:
        title: for a reader of the table.
        make: changes the model.
        compilations: of the next step; none by the exact passes where frozen weights alone change.
        derived: whether frozen weights hold other values afterwards.
        loss: whether the loss is another one afterwards.
    """

    title: str
    make: Callable[[Fp64Decoder], object]
    compilations: int = 0
    derived: bool = True
    loss: bool = True


def frozen(model: nn.Module) -> list[Tensor]:
    return [each for name, each in model.named_parameters() if not each.requires_grad and each.dim() == 2]


def other_weights(model: Fp64Decoder) -> dict[str, Tensor]:
    """Return the state of a model of other weights, with the zeros that this one has."""
    state = fp64_decoder(layers=1, seed=5).state_dict()
    return {name: value * (model.state_dict()[name] != 0) for name, value in state.items()}


def load_in_place(model: Fp64Decoder) -> None:
    model.load_state_dict(other_weights(model))


def load_by_assignment(model: Fp64Decoder) -> None:
    trained = {name: each.requires_grad for name, each in model.named_parameters()}
    model.load_state_dict(other_weights(model), assign=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained[name])


def assign_data(model: Fp64Decoder) -> None:
    for weight in frozen(model):
        weight.data = weight.data.flip(0).clone()


def write_through_data(model: Fp64Decoder) -> None:
    for weight in frozen(model):
        weight.data.copy_(weight.data.flip(1))


def round_trip(model: Fp64Decoder) -> None:
    model.to(torch.bfloat16)
    model.to(torch.float64)


def merge_and_start_anew(model: Fp64Decoder) -> None:
    """As ReLoRA does (arXiv 2307.05695)."""
    for module in model.modules():
        if hasattr(module, "lora_A"):
            weight = module.base_layer.weight.data
            weight += (weight != 0) * (module.scale * 20 * module.lora_B.data @ module.lora_A.data)
            nn.init.normal_(module.lora_A, std=0.1)


def average(model: Fp64Decoder) -> None:
    """Swap in a running mean of what is trained."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(0.9 * parameter.data + 0.01)


def scale(model: Fp64Decoder) -> None:
    for module in model.modules():
        if hasattr(module, "scale"):
            module.scale = module.scale * 3.0


def freeze_some(model: Fp64Decoder) -> None:
    model.layers[0].mlp.up_proj.lora_B.requires_grad_(False)


def widen(model: Fp64Decoder) -> None:
    """Give each adapter two directions more, as a schedule of ranks does."""
    for module in model.modules():
        if hasattr(module, "lora_A"):
            width = module.lora_A.shape[1]
            module.lora_A = nn.Parameter(torch.cat([module.lora_A.data, 0.1 * torch.ones(2, width)]))
            module.lora_B = nn.Parameter(torch.cat([module.lora_B.data, 0.1 * torch.ones(len(module.lora_B), 2)], 1))


def drop_more(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5


CHANGES = {
    "load_state_dict": Change("frozen weights, by `load_state_dict` in place", load_in_place),
    "assign": Change("frozen weights, by `load_state_dict(assign=True)`", load_by_assignment, 1),
    "data": Change("frozen weights, by `p.data = ...`", assign_data),
    "through data": Change("frozen weights, by writes through `p.data`", write_through_data),
    "merge": Change("an adapter is merged into its base and starts anew (ReLoRA)", merge_and_start_anew),
    "dtype": Change("`model.to(torch.bfloat16)` and back", round_trip),
    "average": Change("trained weights: an average is swapped in (EMA)", average, derived=False),
    "scale": Change("the adapters' scaling", scale, 1, derived=False),
    "freeze": Change("`requires_grad` of some adapters", freeze_some, 1, derived=False, loss=False),
    "rank": Change("the rank of the adapters", widen, 1, derived=False),
    "dropout": Change("the adapters' dropout", drop_more, 1, derived=False),
    "mode": Change("`model.eval()` in a training loop", lambda model: model.eval(), derived=False, loss=False),
}

TOLD = ("changed since the factors", "changed after their zeros were counted")
"""What an INFO line says of weights that changed. The report of a fresh compilation is logged beside it."""


def model_for(name: str, options: str) -> Any:
    """Return a model with hand-written adapters, or with PEFT's where they are to drop something out."""
    model: Any = fp64_decoder(layers=1, adapters=() if name == "dropout" else ALL_TARGETS)
    if name == "dropout":
        pytest.importorskip("peft")
        model = with_lora(model, ATTENTION_TARGETS, dropout=0.1).double()
    if options == "LoRS":
        for weight in frozen(model):
            weight.data[:, ::2] = 0
    return model


def step(model: nn.Module, call: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], dict[str, Any]]:
    model.zero_grad()
    torch.manual_seed(3)  # for dropout
    with record_channels() as chosen:
        loss = call(**inputs)[0]
        loss.backward()
    return loss.detach(), gradients(model), {name: values[0] for name, values in chosen.items()}


@pytest.mark.parametrize("name", sweep(CHANGES, "load_state_dict", "through data"))
@pytest.mark.parametrize("options", sweep(OPTIONS, "sparse", "LoRS"))
def test_the_next_step_is_that_of_a_fresh_compilation(
    name: str, options: str, aot_eager_inductor: Any, caplog: pytest.LogCaptureFixture
) -> None:
    change, model, inputs = CHANGES[name], model_for(name, options), batch(61)
    call = torch.compile(model, backend="sparselora", options=OPTIONS[options])
    before, *_ = step(model, call, inputs)
    compiled = len(aot_eager_inductor.graphs)
    change.make(model)
    with caplog.at_level(logging.INFO, logger="sparse_compile"):
        loss, found, chosen = step(model, call, inputs)
    # The exact passes derive nothing from frozen weights.
    expected = 0 if change.derived and options == "exact" else change.compilations
    assert len(aot_eager_inductor.graphs) - compiled == expected
    told = [record.message for record in caplog.records if any(words in record.message for words in TOLD)]
    assert bool(told) == (change.derived and not change.compilations and options != "exact")
    fresh = copy.deepcopy(model)
    wanted_loss, wanted, wanted_chosen = step(
        fresh, torch.compile(fresh, backend="sparselora", options=OPTIONS[options]), inputs
    )
    assert chosen.keys() == wanted_chosen.keys() and bool(chosen) == (options == "sparse")
    for site, channels in chosen.items():
        assert torch.equal(channels, wanted_chosen[site]), site
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-12, atol=1e-12)
    for parameter, gradient in wanted.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-9, atol=1e-12, msg=parameter)
    assert change.loss == bool((loss - before).abs() > 1e-4), "the change changes nothing here: this shows nothing"
