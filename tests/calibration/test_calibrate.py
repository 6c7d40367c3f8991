"""Calibrations of tiny models: what the recipe holds, what it was chosen by, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mapped import mapped_sites, mapped_step
from models import ALL_TARGETS, ATTENTION_TARGETS, batch, fp64_decoder, tiny_llama, with_lora
from oracle import assert_same_step, told, train_step
from sparse_compile import Recipe, SparseLoRAConfig
from sparse_compile.calibration.calibrate import Calibration, calibrate
from sparse_compile.calibration.losses import held_out_loss
from sparse_compile.options.recipe import AffineMap, SiteRecipe
from sparse_compile.reference import masked_dense, output_mask_from_labels
from sweeps import sweep
from tolerances import Tolerance

SITES = [f"layers.{i}.mlp" for i in range(3)]
Batches = Sequence[Mapping[str, Tensor]]


def nearly_linear(x: Tensor) -> Tensor:
    return x + 0.3 * x.tanh()


def blocks_near_a_map(layers: int = 3) -> nn.Module:
    """A decoder whose blocks a map of their width all but equals, and a narrow one does not."""
    return fp64_decoder(layers=layers, gated=False, region=nearly_linear, bias=True)


@torch.no_grad()
def batches_of(model: nn.Module, count: int = 6, vocab: int = 61, **shape: Any) -> list[dict[str, Tensor]]:
    """Batches whose labels are what the model predicts: whatever changes the model, its loss rises."""
    found = []
    for seed in range(count):
        inputs = batch(vocab, **{"rows": 6, "length": 24, "seed": seed, **shape})
        predicted = model(**inputs)[1].argmax(-1).roll(1, 1)
        inputs["labels"] = torch.where(inputs["labels"] == -100, -100, predicted)
        found.append(inputs)
    return found


def run(model: nn.Module, batches: Batches, **arguments: Any) -> Calibration:
    return calibrate(model, batches, progress=False, **{"ranks": (4, 32), "loss_budget": 100.0, **arguments})


def oracle_loss(model: nn.Module, recipe: Recipe, batches: Batches) -> float:
    """Loss of the eager model over the batches that a calibration holds out."""

    @torch.no_grad()
    def call(inputs: Mapping[str, Tensor]) -> Any:
        with masked_dense(mapped_sites(model, recipe), output_mask_from_labels(inputs["labels"])):
            return model(**inputs)

    return held_out_loss(call, [each for place, each in enumerate(batches) if place % 4 == 1])


# --- The recipe -------------------------------------------------------------------------------------------------------


def test_maps_are_as_good_as_they_say_and_better_than_constants() -> None:
    model = blocks_near_a_map()
    batches = batches_of(model)
    wide, narrow = run(model, batches), run(model, batches, ranks=(1,))
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
    # The sites have one size: their order is that of the loss alone. Those chosen come first.
    assert [site.rise for site in found.sites] == sorted(site.rise for site in found.sites)
    assert [site.chosen for site in found.sites] == sorted((site.chosen for site in found.sites), reverse=True)
    assert list(found.recipe.sites) == [name for name in SITES if name in found.recipe.sites]
    curve = dict(found.curve)
    assert curve[len(found.recipe.sites)] == found.rise and curve[0] == 0
    assert all(rise > budget for count, rise in curve.items() if count > len(found.recipe.sites))
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


def test_the_lowest_rank_that_is_about_as_good_is_chosen() -> None:
    """A block of rank 3 at most: more is of no use."""
    model = blocks_near_a_map(layers=2)
    up = model.layers[0].mlp.up_proj
    with torch.no_grad():
        up.lora_B.zero_()
        weight = up.base_layer.weight
        weight.copy_(weight[:, :1] @ weight[:1])
    ranks = {site.name: site.rank for site in run(model, batches_of(model, rows=12), ranks=(16, 2, 4, 2)).sites}
    assert ranks == {"layers.0.mlp": 2, "layers.1.mlp": 16}


def test_two_calibrations_give_one_recipe() -> None:
    model = fp64_decoder(layers=2)
    batches = batches_of(model)
    first, second = (run(model, iter(batches)) for _ in range(2))
    assert first.recipe == second.recipe and first.curve == second.curve and len(first.recipe.sites) == 2


def test_where_it_was_made_is_kept() -> None:
    model = blocks_near_a_map(layers=2)
    found = run(model, batches_of(model))
    assert found.recipe.origin | {"tokens": found.tokens, "loss": found.loss, "rise": found.rise} == found.recipe.origin
    assert found.recipe.origin["loss_budget"] == 100 and found.recipe.origin["torch"] == torch.__version__
    assert all(len(site.weights) == 32 for site in found.recipe.sites.values())
    mask = [~output_mask_from_labels(each["labels"]) for i, each in enumerate(batches_of(model)) if i % 4 != 1]
    assert found.tokens == sum(int(each.sum()) for each in mask)
    text = str(found)
    assert text.startswith("2 of 2 feed-forward blocks") and all(name in text for name in SITES[:2])


def test_context_tokens_that_are_few_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("sparse_compile.calibration.calibrate.say", said.append)
    model = fp64_decoder(layers=1)
    run(model, batches_of(model, count=2, rows=2, length=9))
    (line,) = said
    assert "context tokens" in line and "32 input features" in line
    run(model, batches_of(model, count=2, rows=20, length=32))
    assert said == [line]


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
def test_it_leaves_the_model_as_it_is() -> None:
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


def test_another_ignored_label() -> None:
    """Tokens of a calibration are counted by the label that the loss ignores."""
    model = WithLoss(fp64_decoder(layers=2), ignore_index=-1)
    batches = batches_of(model.model)
    expected = run(model.model, batches)
    for each in batches:
        each["labels"] = each["labels"].where(each["labels"] != -100, -1)
    found = run(model, batches, config={"ignore_index": -1})
    assert found.tokens == expected.tokens and found.loss == pytest.approx(expected.loss, rel=1e-12)
    assert dict(found.curve) == pytest.approx(dict(expected.curve))


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


# --- What is declined and what is refused -----------------------------------------------------------------------------


def test_a_site_whose_activations_overflow_is_declined_and_the_others_are_not() -> None:
    model = fp64_decoder(layers=2)
    with torch.no_grad():
        model.layers[0].mlp.down_proj.base_layer.weight.mul_(1e200)
    found = run(model, [batch(61, seed=seed) for seed in range(6)])
    assert set(found.declined) == {"layers.0.mlp"} and "NaN or infinity" in found.declined["layers.0.mlp"]
    assert [site.name for site in found.sites] == ["layers.1.mlp"] and "layers.0.mlp: act" in str(found)


def test_a_model_without_frozen_blocks_is_refused() -> None:
    model = fp64_decoder(layers=2).requires_grad_(True)
    with pytest.raises(ValueError, match="no feed-forward block of frozen layers"):
        run(model, batches_of(model))


def test_weights_that_are_not_finite_are_refused() -> None:
    model = fp64_decoder(layers=2)
    batches = batches_of(model)
    with torch.no_grad():
        model.layers[1].mlp.up_proj.base_layer.weight[3, 3] = torch.nan
    with pytest.raises(ValueError, match="loss of a batch is nan"):
        run(model, batches)
    assert model.training


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda each: {**each, "labels": each["input_ids"]}, "no context token"),
        (lambda each: {"input_ids": each["input_ids"]}, "no loss"),
        (lambda each: {**each, "labels": torch.full_like(each["labels"], -100)}, "nan"),
    ],
    ids=["no context", "no labels", "no label that counts"],
)
def test_batches_that_say_nothing_are_refused(change: Any, reason: str) -> None:
    model = fp64_decoder(layers=1)
    with pytest.raises(ValueError, match=reason):
        run(model, [change(each) for each in batches_of(model)])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"batches": []}, "at least 2 batches.* got 0"),
        ({"batches": [batch(61)]}, "at least 2 batches.* got 1"),
        ({"loss_budget": -0.1}, "loss_budget"),
        ({"loss_budget": float("nan")}, "loss_budget"),
        ({"ranks": ()}, "ranks"),
        ({"ranks": (8, 0)}, "ranks"),
        ({"ranks": (8.0,)}, "ranks"),
        ({"ranks": (True,)}, "ranks"),
        ({"config": {"ignore": 3}}, "unknown option"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_at_once(arguments: dict[str, Any], reason: str) -> None:
    def never(**inputs: Tensor) -> Any:
        raise AssertionError("the model ran")

    model = fp64_decoder(layers=1)
    model.forward = never  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=reason):
        run(model, **{"batches": [batch(61)] * 2, **arguments})


def test_options_are_taken_in_either_form() -> None:
    model = fp64_decoder(layers=1)
    batches = batches_of(model, count=2)
    first, second = (run(model, batches, config=each) for each in (SparseLoRAConfig(preset="none"), {"preset": "none"}))
    assert first.recipe == second.recipe


def test_a_map_that_breaks_the_loss_costs_infinitely_much_and_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fp64_decoder(layers=2)
    whole = held_out_loss
    taps: list[Any] = []

    def broken(call: Any, *arguments: Any) -> float:
        taps[:] = call.taps.values()
        if taps and taps[0].surrogate is not None:
            raise ValueError("the loss of a batch is nan: nothing can be measured with it")
        return whole(call, *arguments)

    monkeypatch.setattr("sparse_compile.calibration.calibrate.held_out_loss", broken)
    found = run(model, batches_of(model), loss_budget=100)
    assert [(site.name, site.chosen) for site in found.sites] == [("layers.1.mlp", True), ("layers.0.mlp", False)]
    assert found.sites[1].rise == math.inf and math.isfinite(found.rise)
