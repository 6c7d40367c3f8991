"""Calibrations of tiny models: what the recipe holds, what it was chosen by, and what it is good for."""

from __future__ import annotations

import gc
import re
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calibrations import STAYING, Batches, batches_of, blocks_near_a_map, oracle_loss, run
from mapped import mapped_step
from models import ALL_TARGETS, ATTENTION_TARGETS, batch, fp64_decoder, tiny_llama, with_lora
from oracle import assert_same_step, told, train_step
from sparse_compile import Recipe
from sparse_compile.calibration import costs, timing
from sparse_compile.calibration.losses import batch_loss
from sparse_compile.calibration.taps import TappedModel
from sparse_compile.options.presets import AUTO_DENSE_EVERY
from sparse_compile.options.recipe import AffineMap, SiteRecipe
from sparse_compile.reference import output_mask_from_labels
from sweeps import sweep
from tolerances import Tolerance

SITES = [f"layers.{i}.mlp" for i in range(3)]


# --- The recipe -------------------------------------------------------------------------------------------------------


def test_maps_are_as_good_as_they_say_and_better_than_constants() -> None:
    model = blocks_near_a_map()
    batches = batches_of(model)
    wide, narrow = (run(model, batches, ranks=(rank,)) for rank in (32, 1))
    assert [site.rank for site in wide.sites] == [32] * 3 and all(site.error < 0.1 for site in wide.sites)
    assert all(0.3 < site.error < 1 for site in narrow.sites)
    constants = {}
    for name, site in wide.recipe.sites.items():
        bias = mean_output(model, name, batches)
        constants[name] = SiteRecipe(AffineMap(bias.new_zeros(0, 32), bias.new_zeros(32, 0), bias))
        assert site.surrogate is not None and site.surrogate.rank == 32
    constant_rise = oracle_loss(model, Recipe(constants), batches) - wide.loss
    assert 0 <= wide.rise < 0.1 * narrow.rise and narrow.rise < constant_rise


def mean_output(model: nn.Module, name: str, batches: Batches) -> Tensor:
    """The mean of what a block returns for the context tokens that a calibration fits on."""
    rows: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _, args, output: rows.append(output.detach()))
    train = [each for place, each in enumerate(batches) if place % 4 != 1]
    for inputs in train:
        model(**inputs)
        rows[-1] = rows[-1][~output_mask_from_labels(inputs["labels"])]
    handle.remove()
    return torch.cat(rows).mean(0)


@pytest.mark.parametrize("budget", [0.0, 0.003, 100.0])
def test_a_recipe_costs_what_is_said_and_keeps_the_budget(budget: float) -> None:
    model = blocks_near_a_map()
    batches = batches_of(model)
    found = run(model, batches, loss_budget=budget, ranks=(24,))
    assert found.loss == pytest.approx(oracle_loss(model, Recipe({}), batches), rel=1e-12)
    assert {site.name for site in found.sites} == set(SITES)
    assert found.rise <= budget
    assert found.rise == pytest.approx(oracle_loss(model, found.recipe, batches) - found.loss, abs=1e-10)
    for site in found.sites:
        assert site.chosen == (site.name in found.recipe.sites)
    assert [site.chosen for site in found.sites] == sorted((site.chosen for site in found.sites), reverse=True)
    assert list(found.recipe.sites) == [name for name in SITES if name in found.recipe.sites]
    (chosen,) = (point for point in found.curve if point.chosen)
    assert chosen.rise == found.rise and chosen.sites == dict.fromkeys(found.recipe.sites, 24)
    assert (found.curve[0].rise, found.curve[0].sites, found.curve[0].cost, found.dense_cost) == (0, {}, 10, 10)
    assert found.expected_cost == chosen.cost
    # The last block's map changes nothing that the loss reads, so that no budget is too low for it.
    assert len(found.recipe.sites) == {0.0: 1, 100.0: 3}.get(budget, 2)


def test_each_site_is_measured_alone() -> None:
    model = blocks_near_a_map()
    batches = batches_of(model)
    found = run(model, batches, ranks=(4,))
    for site in found.sites:
        alone = Recipe({site.name: found.recipe.sites[site.name]})
        assert site.rise == pytest.approx(oracle_loss(model, alone, batches) - found.loss, abs=1e-10)
        assert found.recipe.sites[site.name].error == site.error
    rises = {site.name: site.rise for site in found.sites}
    assert rises["layers.2.mlp"] == pytest.approx(0, abs=1e-12) and rises["layers.0.mlp"] > 1e-3


def test_a_rank_that_gains_no_error_is_not_tried() -> None:
    """A block of rank 3 at most: more is of no use."""
    model = blocks_near_a_map(layers=2)
    batches = batches_of(model, rows=12)
    ranks = []
    for _ in range(2):
        found = run(model, batches, ranks=(16, 2, 4, 2), loss_budget=0.0)
        ranks.append({site.name: site.rank for site in found.sites}["layers.0.mlp"])
        up = model.layers[0].mlp.up_proj
        with torch.no_grad():
            up.lora_B.zero_()
            weight = up.base_layer.weight
            weight.copy_(weight[:, :1] @ weight[:1])
    assert ranks == [16, 2]


def test_two_calibrations_give_one_recipe() -> None:
    model = fp64_decoder(layers=2)
    batches = batches_of(model)
    first, second = (run(model, iter(batches)) for _ in range(2))
    assert first.recipe == second.recipe and first.curve == second.curve and len(first.recipe.sites) == 2


def test_where_it_was_made_is_kept(tmp_path: Path) -> None:
    model = blocks_near_a_map(layers=2)
    batches = batches_of(model)
    found = run(model, batches)
    origin = found.recipe.origin
    expected = {
        "goal": "loss_budget",
        "loss_budget": 100.0,
        "tokens": found.tokens,
        "loss": found.loss,
        "rise": found.rise,
        "expected_loss": found.loss + found.rise,
        "step_seconds": 10.0,
        "expected_step_seconds": found.expected_cost,
        "forwards": found.forwards,
        "torch": torch.__version__,
    }
    assert origin | expected == origin
    found.recipe.save(tmp_path)
    assert Recipe.load(tmp_path).origin == origin
    assert (found.recipe.dense_every, found.recipe.end_step) == (AUTO_DENSE_EVERY, None)
    assert all(len(site.weights) == 32 for site in found.recipe.sites.values())
    mask = [~output_mask_from_labels(each["labels"]) for i, each in enumerate(batches) if i % 4 != 1]
    assert found.tokens == sum(int(each.sum()) for each in mask)
    digests = {origin["data"], run(model, batches_of(model)).recipe.origin["data"]}
    assert len(digests) == 1
    assert run(model, batches[::-1]).recipe.origin["data"] not in digests


def test_context_tokens_that_are_few_are_told_of(said: list[str]) -> None:
    model = fp64_decoder(layers=1)
    run(model, batches_of(model, count=2, rows=2, length=9))
    (line,) = said
    assert "context tokens" in line and "32 input features" in line
    run(model, batches_of(model, count=2, rows=20, length=32))
    assert said == [line]


def test_no_rank_above_the_number_of_tokens_is_tried(said: list[str]) -> None:
    model = fp64_decoder(layers=1)
    batches = batches_of(model, count=2, rows=1, length=9)
    found = run(model, batches, ranks=(2, 32), loss_budget=100.0)
    assert 2 <= found.tokens < 32 and [site.rank for site in found.sites] == [2]
    assert f"No rank above {found.tokens} is tried" in said[0]
    found = run(model, batches, ranks=(32,))
    assert found.recipe.sites == {} and f"{found.tokens} context tokens are fewer" in found.declined["layers.0.mlp"]


# --- Goals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("goal", [{"speedup": 1.05}, {"flops": 0.94}], ids=str)
def test_a_cost_is_reached_at_the_least_loss(goal: dict[str, float]) -> None:
    model = blocks_near_a_map()
    batches = batches_of(model)
    found = run(model, batches, ranks=(0, 24), **goal)
    assert found.reason == "" and 0 < len(found.recipe.sites) < 3
    assert found.rise == pytest.approx(oracle_loss(model, found.recipe, batches) - found.loss, abs=1e-10)
    limit = found.dense_cost / goal["speedup"] if "speedup" in goal else goal["flops"]
    assert found.expected_cost <= limit < found.dense_cost
    assert found.unit == ("seconds" if "speedup" in goal else "flops")
    assert found.recipe.origin.items() >= {"goal": next(iter(goal)), **goal}.items()
    saved = {site.name: site.saved for site in found.sites if site.chosen}
    assert found.expected_cost / found.dense_cost == pytest.approx(1 - sum(saved.values()))
    for point in found.curve:
        assert point.chosen or point.cost > limit or point.rise >= found.rise


def test_seconds_are_what_was_timed() -> None:
    """Of a block of one second, context tokens have their share."""
    model = blocks_near_a_map(layers=2)
    batches = batches_of(model)
    found = run(model, batches, ranks=(32,))
    share = [float((~output_mask_from_labels(each["labels"])).double().mean()) for each in batches]
    (expected,) = {each for each in share if found.expected_cost == pytest.approx(10 - 2 * (each - 0.05 - 0.064))}
    assert found.speedup == pytest.approx(10 / found.expected_cost) and 0 < expected < 1
    assert f"10 s a step as it is (measured), {found.expected_cost:.4g} s expected" in str(found)


@pytest.mark.parametrize(
    ("goal", "reason"),
    [
        ({"speedup": 3.0}, r"the cheapest map in each of 3 blocks gives 1\.\d\dx, at \+"),
        ({"flops": 0.01}, r"the cheapest map in each of 3 blocks gives \d+\.\d% of the FLOPs, at \+"),
        ({"loss_budget": 0.0}, r"a map of layers\.\d\.mlp costs least, \+0\.\d+"),
    ],
    ids=str,
)
def test_a_goal_that_is_out_of_reach_leaves_the_model_dense(
    goal: dict[str, float], reason: str, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = blocks_near_a_map()
    batches = batches_of(model)
    if "loss_budget" in goal:
        # The last block's map would cost nothing.
        monkeypatch.setattr(costs, "map_seconds", lambda *_, **__: 0.1)
        model.layers[2].mlp.up_proj.base_layer.weight.requires_grad_(True)
    found = run(model, batches, **goal)
    assert found.recipe == Recipe({}) and found.rise == 0 and found.expected_cost == found.dense_cost
    assert [point.sites for point in found.curve if point.chosen] == [{}]
    (line,) = said
    assert line.endswith(found.reason)
    assert re.search(reason, found.reason), found.reason
    assert f"is not met: {found.reason}" in str(found)


def test_blocks_whose_maps_are_slower_stay_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "map_seconds", lambda *_, **__: 2.0)
    model = blocks_near_a_map(layers=2)
    found = run(model, batches_of(model))
    assert found.recipe.sites == {} and found.sites == () and "cheaper" in found.reason
    assert set(found.declined) == set(SITES[:2]) and "cheaper" in found.declined[SITES[0]]


def test_a_step_that_cannot_be_timed_is_counted_in_flops(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def untimed(*_: Any) -> float:
        raise timing.Untimed("its clock stands")

    monkeypatch.setattr(costs, "step_seconds", untimed)
    model = blocks_near_a_map(layers=2)
    batches = batches_of(model)
    found = run(model, batches)
    assert found.unit == "flops" and len(found.recipe.sites) == 2 and 0 < found.expected_cost < 1
    assert found.recipe.origin["expected_flops"] == found.expected_cost
    assert said == ["costs are counted in FLOPs, for the step cannot be timed: its clock stands"]
    assert "of the dense step's FLOPs" in str(found)
    with pytest.raises(ValueError, match=r"its clock stands\. Give flops="):
        run(model, batches, speedup=1.1)


# --- Forwards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [32, 80])
def test_no_more_forwards_are_made_than_are_allowed(
    most: int, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    model = blocks_near_a_map()
    batches = batches_of(model, count=12)
    calls: list[None] = []
    whole = TappedModel.__call__
    monkeypatch.setattr(TappedModel, "__call__", lambda self, inputs: calls.append(None) or whole(self, inputs))
    found = run(model, batches, max_forwards=most, ranks=(0, 8, 16), loss_budget=0.02)
    assert found.forwards == len(calls) + timing.STEP_FORWARDS <= most
    assert found.rise == pytest.approx(oracle_loss(model, found.recipe, batches[: most // 3]) - found.loss, abs=1e-10)
    assert len(found.recipe.sites) >= 1 and found.rise <= 0.02
    used = [line for line in said if "batches are used" in line]
    assert used == ([] if most == 80 else ["10 of 12 batches are used: more take max_forwards=36"])


def test_a_recipe_that_fails_with_all_batches_is_not_chosen(monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    """The search sees the first held-out batch; the second says that the map of the first block costs too much."""
    model = blocks_near_a_map()
    batches = batches_of(model, count=12)
    worst = batches[5]
    whole, taps = batch_loss, []

    def dear(call: Any, inputs: Any, *arguments: Any) -> tuple[float, float]:
        loss, tokens = whole(call, inputs, *arguments)
        taps[:] = call.taps.values()
        return (loss + 5.0 if inputs is worst and taps[0].surrogate is not None else loss), tokens

    monkeypatch.setattr("sparse_compile.calibration.held_out.batch_loss", dear)
    found = run(model, batches, max_forwards=36, ranks=(24,), loss_budget=1.0)
    assert set(found.recipe.sites) <= {SITES[1], SITES[2]} and found.rise <= 1.0
    assert any(SITES[0] in point.sites and point.rise <= 1.0 for point in found.curve)


# --- Pictures ---------------------------------------------------------------------------------------------------------


def test_the_curve_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model = blocks_near_a_map(layers=2)
    found = run(model, batches_of(model), loss_budget=0.01)
    found.plot(tmp_path / "curve.svg")
    text = (tmp_path / "curve.svg").read_text(encoding="utf-8")
    assert text.count("<path") > len(found.curve)
    found.plot(str(tmp_path / "curve.png"))
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    model = fp64_decoder(layers=1)
    found = run(model, batches_of(model, count=2))
    with pytest.raises(ImportError, match=r"pip install matplotlib.*Calibration\.curve"):
        found.plot(tmp_path / "curve.png")
    assert list(tmp_path.glob("*.png")) == []


# --- The recipe in training -------------------------------------------------------------------------------------------

LLAMAS = {
    "fp32": (torch.float32, ALL_TARGETS),
    "bf16": (torch.bfloat16, ATTENTION_TARGETS),
    "bf16, wider adapters": (torch.bfloat16, ALL_TARGETS),
}


@pytest.mark.parametrize("kind", sweep(LLAMAS, "bf16"))
def test_a_llama_is_calibrated_and_trains_as_the_oracle_says(kind: str, tmp_path: Path, eager_inductor: Any) -> None:
    dtype, targets = LLAMAS[kind]
    model = with_lora(tiny_llama(layers=2, dtype=dtype), targets)
    found = run(model, [batch(97, padding="left", seed=seed) for seed in range(4)], ranks=(2, 8))
    assert len(found.recipe.sites) == 2 and found.declined == {}
    found.recipe.save(tmp_path)
    options = {"recipe": str(tmp_path), "strict": True}
    call = torch.compile(model, backend="sparselora", options=options)
    inputs = batch(97, padding="left")
    with told() as messages:
        step = train_step(model, call, inputs)
    expected = mapped_step(model, found.recipe, inputs)
    wide = Tolerance(max=0.25, rms=5e-2, why="three times the table's: forward and backward, all in bf16")
    assert_same_step(step, expected, dtype, tolerance=wide if dtype == torch.bfloat16 else None)
    assert messages == [] and eager_inductor.sparse == [True]


@pytest.mark.slow
@pytest.mark.parametrize("before", ["compiled in place", "wrapped"])
def test_a_compiled_model_is_calibrated_as_it_is(before: str, eager_inductor: Any) -> None:
    model, batches = fp64_decoder(layers=2), batches_of(fp64_decoder(layers=2))
    call, expected = model, run(fp64_decoder(layers=2), batches)
    if before == "wrapped":
        call = torch.compile(model, backend="sparselora", options={"layer_sparsity": {"mlp": 0.5}})
    else:
        model.compile(backend="sparselora", options={"layer_sparsity": {"mlp": 0.5}})
        train_step(model, call, batches[0])
    found = run(call, batches)
    assert found.recipe == expected.recipe and found.curve == expected.curve


def test_a_model_is_compiled_in_place_after_its_calibration(eager_inductor: Any) -> None:
    model = fp64_decoder(layers=2)
    batches = batches_of(model)
    recipe = run(model, batches).recipe
    model.compile(backend="sparselora", options={"recipe": recipe, "strict": True})
    step = train_step(model, model, batches[0])
    assert_same_step(step, mapped_step(fp64_decoder(layers=2), recipe, batches[0]), torch.float64)
    assert eager_inductor.sparse == [True]


@pytest.mark.slow
def test_it_leaves_the_model_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "step_seconds", timing.step_seconds)
    model = with_lora(tiny_llama(layers=2), dropout=0.3)
    model(**batch(97)).loss.backward()
    values = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    batches = [batch(97, seed=seed) for seed in range(2)]
    before, generator = [{name: each.clone() for name, each in some.items()} for some in batches], torch.get_rng_state()
    run(model, batches, ranks=(2,))
    assert torch.equal(torch.get_rng_state(), generator) and model.training
    assert model.state_dict().keys() == values.keys()
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(model.get_parameter(name).grad, each) for name, each in gradients.items())
    for some, kept in zip(batches, before, strict=True):
        assert all(torch.equal(some[name], each) for name, each in kept.items())


def test_dynamo_keeps_no_model_alive() -> None:
    model = fp64_decoder(layers=1)
    run(model, batches_of(model, count=2))
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_another_ignored_label() -> None:
    """Tokens of a calibration are counted by the label that the loss ignores."""
    model = WithLoss(fp64_decoder(layers=2), ignore_index=-1)
    batches = batches_of(model.model)
    expected = run(model.model, batches)
    for each in batches:
        each["labels"] = each["labels"].where(each["labels"] != -100, -1)
    found = run(model, batches, config={"ignore_index": -1, **STAYING})
    assert found.tokens == expected.tokens and found.loss == pytest.approx(expected.loss, rel=1e-12)
    assert [point.rise for point in found.curve] == pytest.approx([point.rise for point in expected.curve])


class WithLoss(nn.Module):
    """Return a loss of its own, bare."""

    def __init__(self, model: nn.Module, ignore_index: int = -100) -> None:
        super().__init__()
        self.model = model
        self.ignore_index = ignore_index

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.model(input_ids)[1]
        target = labels[:, 1:].reshape(-1)
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), target, ignore_index=self.ignore_index)
