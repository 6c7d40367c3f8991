"""The support matrix, adapters that change while a model trains: switched off, merged, exchanged, swapped, unloaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adapter_rows import SITES, peft, trained_for_a_while
from models import ALL_TARGETS, batch
from oracle import assert_same_step, oracle_step, sparse_step, told
from sparse_compile.compiler.explain import explain
from sweeps import slow
from tolerances import Tolerance, assert_close_rms

HF_FP64 = Tolerance(max=1e-5, rms=1e-5, why="Hugging Face's norms compute in fp32 whatever the dtype.")


def compiled(model: nn.Module) -> Any:
    options = {"preset": "none", "layer_sparsity": SITES, "strict": True}
    return torch.compile(model, backend="sparselora", dynamic=False, options=options)


def assert_sparse_as_the_oracle_says(model: nn.Module, call: Any, **inputs: Any) -> None:
    step, kept = sparse_step(model, call, inputs)
    assert len(kept) == len(SITES)
    assert_same_step(step, oracle_step(model, kept, inputs), torch.float32)


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}], ids=["adapters", "modules_to_save"])
def test_disabled_adapters_run_dense_and_silent(options: dict[str, Any], eager_inductor: Any) -> None:
    model, inputs = peft(**options)(), batch(97)
    call = compiled(model)
    with told() as messages:
        with model.disable_adapter():
            loss = call(**inputs).loss
            assert_close_rms(loss, model(**inputs).loss, torch.float32)
        assert not loss.requires_grad and eager_inductor.sparse == [False]
        assert_sparse_as_the_oracle_says(model, call, **inputs)
        with model.disable_adapter():
            assert torch.equal(call(**inputs).loss, loss)
        assert_sparse_as_the_oracle_says(model, call, **inputs)
    assert messages == [] and eager_inductor.runs == [2, 2]


@pytest.mark.slow
def test_merged_adapters_are_told_of_once_and_train_again_once_unmerged(eager_inductor: Any) -> None:
    model, inputs = peft()(), batch(97)
    call = compiled(model)
    with told() as messages:
        assert_sparse_as_the_oracle_says(model, call, **inputs)
    assert messages == []
    model.merge_adapter()  # type: ignore[operator]
    with told() as messages:
        losses = [call(**inputs).loss for _ in range(2)]
    assert not losses[0].requires_grad and eager_inductor.sparse == [True, False]
    (message,) = messages
    assert "merged into the base or switched off" in message and "unmerge_adapter()" in message
    model.unmerge_adapter()  # type: ignore[operator]
    assert_close_rms(losses[0], model(**inputs).loss, torch.float32)
    with told() as messages:
        assert_sparse_as_the_oracle_says(model, call, **inputs)
        with torch.no_grad():
            model.merge_adapter()  # type: ignore[operator]
            call(**inputs)
    assert messages == [], "evaluation of a merged model is no mistake"


def test_another_adapter_trains_after_set_adapter(eager_inductor: Any) -> None:
    from peft import LoraConfig

    model, inputs = peft()(), batch(97)
    model.add_adapter("second", LoraConfig(r=2, target_modules=list(ALL_TARGETS)))  # type: ignore[operator]
    call = compiled(model)
    with told() as messages:
        for name in ("default", "second", "default"):
            model.set_adapter(name)  # type: ignore[operator]
            trained_for_a_while(model, seed=5)
            assert_sparse_as_the_oracle_says(model, call, **inputs)
    assert messages == [] and eager_inductor.sparse[:2] == [True, True]


def beside_a_frozen_one(active: tuple[str, ...], **options: Any) -> nn.Module:
    """Return a model in fp64 with two adapters, `active` in this order, of which `default` is frozen."""
    from peft import LoraConfig

    model = peft(**options)()
    second = LoraConfig(r=2, target_modules=["q_proj", "gate_proj", "down_proj"], **options)
    model.add_adapter("second", second)  # type: ignore[operator]
    model.base_model.set_adapter(list(active))  # type: ignore[operator, union-attr]
    trained_for_a_while(model, seed=2)
    for name, parameter in model.named_parameters():
        if ".default." in name:
            parameter.requires_grad_(False)
    return model.double()


def with_frozen_a() -> nn.Module:
    """Return a model in fp64 whose adapters train B alone (LoRA-FA, arXiv 2308.03303)."""
    model = peft()()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    return model.double()


FROZEN: dict[str, Callable[[], nn.Module]] = {
    "frozen_first": lambda: beside_a_frozen_one(("default", "second")),
    "trained_first": lambda: beside_a_frozen_one(("second", "default")),
    "dora": lambda: beside_a_frozen_one(("default", "second"), use_dora=True),
    "only_b_trained": with_frozen_a,
}


@pytest.mark.parametrize("preset", ["none", slow("exact")])
@pytest.mark.parametrize("name", ["frozen_first", slow("trained_first"), slow("dora"), slow("only_b_trained")])
def test_a_frozen_adapter_is_a_part_of_its_layer(name: str, preset: str, eager_inductor: Any) -> None:
    model, inputs = FROZEN[name](), batch(97)
    options = {"preset": preset, "layer_sparsity": SITES, "strict": True}
    with told() as messages:
        step, kept = sparse_step(model, torch.compile(model, backend="sparselora", options=options), inputs)
    assert messages == [] and len(kept) == len(SITES)
    assert_same_step(step, oracle_step(model, kept, inputs), torch.float64, tolerance=HF_FP64)


def test_frozen_adapters_are_counted_as_adapters() -> None:
    (graph,) = explain(FROZEN["frozen_first"](), **batch(97)).graphs
    # Seven layers in each of two blocks and the head; `second` is on three of the seven.
    assert (graph.projections, graph.adapters, graph.frozen_adapters) == (15, 20, 14)


def test_a_hot_swapped_adapter_trains_without_recompilation(eager_inductor: Any, tmp_path: Path) -> None:
    from peft.utils.hotswap import hotswap_adapter

    model, other, inputs = peft()(), trained_for_a_while(peft(init_lora_weights=False)(), seed=7), batch(97)
    other.save_pretrained(tmp_path)  # type: ignore[operator]
    call = compiled(model)
    assert_sparse_as_the_oracle_says(model, call, **inputs)
    hotswap_adapter(model, str(tmp_path), adapter_name="default", torch_device="cpu")
    swapped = dict(other.named_parameters())
    assert all(torch.equal(each, swapped[name]) for name, each in model.named_parameters() if each.requires_grad)
    with told() as messages:
        assert_sparse_as_the_oracle_says(model, call, **inputs)
    assert messages == [] and eager_inductor.runs == [2]


@pytest.mark.slow
def test_a_trained_model_that_is_merged_and_unloaded_computes_the_same(eager_inductor: Any) -> None:
    model, inputs = peft()(), batch(97)
    model.compile(backend="sparselora", options={"preset": "none", "layer_sparsity": SITES, "start_step": 0})
    with torch.no_grad():
        untrained = model(**inputs).logits
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    for _ in range(2):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with told() as messages, torch.no_grad():
        trained = model(**inputs).logits
        merged = model.merge_and_unload()  # type: ignore[operator]
        assert not any("lora_" in name for name, _ in merged.named_parameters())
        assert_close_rms(merged(**inputs).logits, trained, torch.float32)
    assert messages == [] and eager_inductor.sparse == [False, True] and eager_inductor.runs == [2, 2]
    assert (trained - untrained).abs().max() > 1e-2
