"""What is derived from frozen weights follows them: in place, told, and for as long as the model lives."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from graphs import MLP, Head, tokens
from models import ATTENTION_TARGETS, batch, fp64_decoder, with_lora
from oracle import train_step
from sparse_compile import Schedule
from sparse_compile.kernels.channel_selection import record_channels
from sparse_compile.training.session import session_for

SITE = {"body.0": 0.5}


def compiled(model: nn.Module, **options: Any) -> Any:
    given = {"preset": "none", "layer_sparsity": SITE, "start_step": 0, **options}
    return torch.compile(model, backend="sparselora", options=given)


def chosen(call: Any, *args: Any, **kwargs: Any) -> Tensor:
    with record_channels() as record:
        found = call(*args, **kwargs)
        (found if isinstance(found, Tensor) else found[0]).backward()
    ((channels,),) = record.values()
    return channels


def up_weight(model: nn.Module) -> Tensor:
    return model.get_submodule("body.0.up.base_layer").weight  # type: ignore[no-any-return,union-attr]


def test_a_change_in_the_dense_phase_is_seen_by_the_first_sparse_step(eager_inductor: Any) -> None:
    model, schedule, inputs = Head(MLP()), Schedule(), tokens()
    call = compiled(model, start_step=1, schedule=schedule)
    call(*inputs).backward()
    up_weight(model).data.copy_(up_weight(model).data.flip(0))
    call(*inputs).backward()
    schedule.set_position(1, 9)
    fresh = copy.deepcopy(model)
    assert torch.equal(chosen(call, *inputs), chosen(compiled(fresh), *inputs))
    assert len(eager_inductor.graphs) == 2, "one for the fresh model alone"


def test_each_change_is_told_once(eager_inductor: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = Head(MLP()), tokens()
    call = compiled(model)
    with caplog.at_level(logging.INFO, logger="sparse_compile"):
        for changes in (False, True, False, True):
            if changes:
                up_weight(model).data.mul_(1.5)
            call(*inputs).backward()
    told = [each.message for each in caplog.records if "changed since the factors" in each.message]
    assert len(told) == 2 and "the frozen weight of body.0.up" in told[0]
    assert session_for([each for each in model.parameters() if each.requires_grad]).renewals == 2


def test_weights_that_are_not_finite_keep_their_factors_and_are_told_of(eager_inductor: Any) -> None:
    model, inputs = Head(MLP()), tokens()
    call = compiled(model)
    before = chosen(call, *inputs)
    weight = up_weight(model).detach().clone()
    up_weight(model).data[0, 0] = torch.nan
    with pytest.warns(UserWarning, match=r"body\.0\.up changed and have no factors now(?s:.*)not finite|NaN|infinite"):
        assert torch.equal(chosen(call, *inputs), before)
    up_weight(model).data.copy_(weight)
    assert torch.equal(chosen(call, *inputs), before)


def test_published_factors_stay_and_are_told_of(eager_inductor: Any, tmp_path: Any) -> None:
    model, inputs = Head(MLP()), tokens()
    file = tmp_path / "factors.safetensors"
    save_file({"body.0.up.w1": torch.randn(8, 2), "body.0.up.w2": torch.randn(2, 12)}, str(file))
    call = compiled(model, predictor_path=str(file))
    before = chosen(call, *inputs)
    up_weight(model).data.mul_(-1)
    with pytest.warns(UserWarning, match="published ones"):
        assert torch.equal(chosen(call, *inputs), before)


def test_the_weights_of_a_dead_model_are_freed(eager_inductor: Any) -> None:
    model, inputs = Head(MLP()), tokens()
    call = compiled(model)
    call(*inputs).backward()
    weight = weakref.ref(up_weight(model))
    eager_inductor.graphs.clear()  # captured graphs hold example values
    del model, call
    gc.collect()
    assert weight() is None


@pytest.mark.slow
def test_a_merge_and_its_reverse(aot_eager_inductor: Any) -> None:
    pytest.importorskip("peft")
    model, inputs = with_lora(fp64_decoder(layers=1, adapters=()), ATTENTION_TARGETS), batch(61)
    options = {"layer_sparsity": {"layers.0.mlp": 0.5, "layers.0.self_attn": 0.5}}
    call = compiled(model, **options)
    train_step(model, call, inputs)
    model.merge_adapter()  # type: ignore[operator]
    with torch.no_grad():
        call(**inputs)
    model.unmerge_adapter()  # type: ignore[operator]
    step = train_step(model, call, inputs)
    fresh = copy.deepcopy(model)
    wanted = train_step(fresh, compiled(fresh, **options), inputs)
    torch.testing.assert_close(step.loss, wanted.loss)
    for name, gradient in wanted.gradients.items():
        torch.testing.assert_close(step.gradients[name], gradient)


@pytest.mark.slow
def test_a_layer_that_is_quantised_again(aot_eager_inductor: Any) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from four_bit import pair

    model, inputs = with_lora(pair(layers=1, dtype=torch.float32)[0], ATTENTION_TARGETS), batch(97)
    options = {"layer_sparsity": {"layers.0.mlp": 0.5}}
    call = compiled(model, **options)
    train_step(model, call, inputs)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            state = module.weight.quant_state
            dense = bitsandbytes.functional.dequantize_4bit(module.weight.data, state).flip(0).contiguous()
            data, other = bitsandbytes.functional.quantize_4bit(dense, blocksize=state.blocksize, quant_type="nf4")
            module.weight.data.copy_(data)
            state.absmax.copy_(other.absmax)
    with record_channels() as record:
        step = train_step(model, call, inputs)
    assert len(aot_eager_inductor.graphs) == 1
    fresh = copy.deepcopy(model)
    with record_channels() as wanted_record:
        wanted = train_step(fresh, compiled(fresh, **options), inputs)
    assert record.keys() == wanted_record.keys() and len(record) == 1
    for site, (channels,) in record.items():
        assert torch.equal(channels, wanted_record[site][0])
    torch.testing.assert_close(step.loss, wanted.loss)
