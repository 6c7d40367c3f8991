"""What a step is expected to cost: what was timed once for each kind of block, or FLOPs as reports have them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mapped import random_map
from models import batch, fp64_decoder
from sparse_compile import Recipe, SparseLoRAConfig, explain
from sparse_compile.calibration import costs, timing
from sparse_compile.calibration.costs import cost_in_flops, cost_in_seconds, samples_of
from sparse_compile.calibration.taps import TappedModel
from sparse_compile.calibration.timing import Untimed
from sparse_compile.options.recipe import SiteRecipe

SITES = [f"layers.{i}.mlp" for i in range(3)]
MAPS = {name: {rank: random_map(32, rank) for rank in (0, 4, 8)} for name in SITES}


def tapped(model: nn.Module) -> TappedModel:
    run = TappedModel(model, SparseLoRAConfig(context_exit=1))
    run(batch(61))
    return run


def test_each_kind_of_block_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[Any] = []
    monkeypatch.setattr(costs, "step_seconds", lambda *_: 40.0)
    monkeypatch.setattr(costs, "block_seconds", lambda block, x, **_: timed.append(tuple(x.shape)) or 8.0)

    def seconds_of_map(surrogate: Any, x: Tensor, context: Tensor, *_: Any, **__: Any) -> float:
        timed.append(surrogate.rank)
        return {0: 1.0, 4: 2.0, 8: 1.5}[surrogate.rank]

    monkeypatch.setattr(costs, "map_seconds", seconds_of_map)
    run, inputs = tapped(fp64_decoder()), batch(61)
    samples = samples_of(run, inputs)
    found = cost_in_seconds(run, inputs, samples, MAPS, (4,))
    assert timed == [(*inputs["input_ids"].shape, 32), 0, 4, 8]
    assert (found.unit, found.dense) == ("seconds", 40.0)
    share = float(samples[SITES[0]].context.double().mean())
    assert 0 < share < 1
    for name in SITES:
        # Rank 8 was timed as faster than rank 4, which it is not.
        expected = {0: (8 * share - 1) / 40, 4: (8 * share - 2) / 40, 8: (8 * share - 2) / 40}
        assert found.saved[name] == pytest.approx(expected)


def test_real_blocks_cost_some_of_the_step_and_a_constant_saves_most(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("step_seconds", "block_seconds", "map_seconds"):
        monkeypatch.setattr(costs, name, getattr(timing, name))
    model = fp64_decoder(layers=2, hidden=64, ffn=512, vocab=61)
    maps = {name: {rank: random_map(64, rank) for rank in (0, 64)} for name in SITES[:2]}
    inputs = batch(61, rows=8, length=64)
    run = tapped(model)
    found = cost_in_seconds(run, inputs, samples_of(run, inputs), maps, (4,))
    assert found.dense > 0
    for saved in found.saved.values():
        assert 0 < saved[64] <= saved[0] < 1


def test_a_block_that_runs_twice_saves_twice() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = fp64_decoder(layers=2)
            self.model.layers[1] = self.model.layers[0]

        def forward(self, **inputs: Tensor) -> Any:
            return self.model(**inputs)

    run, once = tapped(Tied()), tapped(fp64_decoder(layers=2))
    (tied,), inputs = samples_of(run, batch(61)).values(), batch(61)
    assert tied.uses == 2
    counted = [
        cost_in_flops(each, inputs, samples_of(each, inputs), {name: [4] for name in each.taps}, (4,))
        for each in (run, once)
    ]
    assert sum(each[4] for each in counted[0].saved.values()) == pytest.approx(
        sum(each[4] for each in counted[1].saved.values())
    )


def test_flops_are_those_that_a_report_of_the_recipe_has() -> None:
    model, inputs = fp64_decoder(adapters=("q_proj", "k_proj", "v_proj", "o_proj")), batch(61)
    run = tapped(model)
    found = cost_in_flops(run, inputs, samples_of(run, inputs), {name: [4, 8] for name in SITES}, (4,))
    recipe = Recipe({SITES[0]: SiteRecipe(random_map(32, 8)), SITES[2]: SiteRecipe(random_map(32, 4))})
    dense, mapped = (explain(model, config={"preset": "none", **each}, **inputs) for each in ({}, {"recipe": recipe}))
    assert found.unit == "flops" and found.dense == dense.flops_before
    saved = dense.flops_after - mapped.flops_after
    assert found.dense * (found.saved[SITES[0]][8] + found.saved[SITES[2]][4]) == pytest.approx(saved, rel=1e-6)


def test_weights_that_are_not_at_hand_cannot_be_timed() -> None:
    run, inputs = tapped(fp64_decoder()), batch(61)
    samples = samples_of(run, inputs)
    del run.blocks[SITES[1]]
    with pytest.raises(Untimed, match=SITES[1]):
        cost_in_seconds(run, inputs, samples, MAPS, (4,))


def test_a_model_that_trains_nothing_has_no_step() -> None:
    model = fp64_decoder().requires_grad_(False)
    run, inputs = tapped(model), batch(61)
    with pytest.raises(ValueError, match="nothing of the model is trained"):
        cost_in_flops(run, inputs, samples_of(run, inputs), {SITES[0]: [4]}, (4,))


def test_samples_are_what_blocks_read_and_one_tensor_for_all_of_a_kind() -> None:
    model, inputs, read = fp64_decoder(), batch(61), []
    run = tapped(model)
    handle = model.layers[0].mlp.register_forward_hook(lambda _, args, output: read.append(args[0].detach()))
    model(**inputs)
    handle.remove()
    samples = samples_of(run, inputs)
    assert list(samples) == SITES and len({id(each.x) for each in samples.values()}) == 1
    torch.testing.assert_close(samples[SITES[0]].x, read[0])
    assert all(tap.probe is None for tap in run.taps.values())
