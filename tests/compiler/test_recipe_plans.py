"""What the backend makes of a recipe: which sites get what, what is refused, and what reports and graphs show."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graphs import targets
from mapped import mapped_step, random_map, random_recipe
from models import batch, fp64_decoder
from oracle import Step, assert_same_step, sparse_step, told, train_step
from sparse_compile import Recipe, explain
from sparse_compile.options.recipe import SiteRecipe
from sparse_compile.predictor.weight_state import fingerprint
from sweeps import slow

pytestmark = pytest.mark.usefixtures("eager_inductor")

WIDTH = 32
RANKS = {"layers.0.mlp": 3, "layers.1.mlp": 0}
RECIPE = random_recipe(WIDTH, RANKS)


def compiled(model: nn.Module, recipe: Any, **options: Any) -> Callable[..., Any]:
    options = {"preset": "none", "recipe": recipe, **options}
    return torch.compile(model, backend="sparselora", dynamic=False, options=options)


def assert_bit_equal(actual: Step, expected: Step) -> None:
    assert torch.equal(actual.loss, expected.loss)
    assert all(torch.equal(actual.gradients[name], each) for name, each in expected.gradients.items())


def with_weights(model: nn.Module, **changed: SiteRecipe) -> Recipe:
    """The recipe with the fingerprint of a decoder's blocks in it."""
    sites = {}
    for name, site in RECIPE.sites.items():
        block = model.get_submodule(name)
        frozen = [getattr(block, each).base_layer.weight for each in ("gate_proj", "up_proj", "down_proj")]
        sites[name] = SiteRecipe(site.surrogate, weights=fingerprint(frozen))
    return Recipe(sites | changed)


# --- Which site gets what ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["none", slow("o2")])
def test_sparsities_of_a_recipe_are_those_of_layer_sparsity(preset: str) -> None:
    model, inputs = fp64_decoder(layers=2), batch(61)
    sparsity = {"layers.0.mlp": 0.6, "layers.0.self_attn": 0.7}
    by_recipe = compiled(model, Recipe.of_sparsities(sparsity), preset=preset)
    by_option = compiled(model, None, layer_sparsity=sparsity, preset=preset)
    (step, kept), (expected, expected_kept) = (sparse_step(model, call, inputs) for call in (by_recipe, by_option))
    assert kept.keys() == expected_kept.keys() == sparsity.keys()
    assert_bit_equal(step, expected)


def test_maps_and_chosen_channels_side_by_side() -> None:
    model, inputs = fp64_decoder(layers=2), batch(61, padding="left")
    sparse = {"layers.0.self_attn": SiteRecipe(sparsity=0.5), "layers.1.mlp": SiteRecipe(sparsity=0.9)}
    recipe = Recipe(RECIPE.sites | sparse)
    step, kept = sparse_step(model, compiled(model, recipe, strict=True), inputs)
    assert kept.keys() == sparse.keys()
    assert_same_step(step, mapped_step(model, recipe, inputs, kept=kept), torch.float64)


@pytest.mark.parametrize("preset", [slow("none"), "exact", slow("o1"), slow("o2")])
def test_a_site_that_is_not_named_is_dense(preset: str) -> None:
    model = fp64_decoder(layers=2)
    recipe = RECIPE.without("layers.1.mlp")
    report = explain(model, **batch(61), config={"recipe": recipe, "preset": preset})
    sparse = {site.name: site.provider for site in report.sites if site.sparsity}
    assert sparse == {"layers.0.mlp": "map of rank 3"}
    assert explain(model, **batch(61), config={"recipe": Recipe({}), "preset": preset}).flops_after > report.flops_after


def test_the_longest_name_that_matches_counts() -> None:
    model, inputs = fp64_decoder(layers=3), batch(61)
    short, long = random_map(WIDTH, 2, seed=7), random_map(WIDTH, 4, seed=8)
    recipe = Recipe({"mlp": SiteRecipe(short), "1.mlp": SiteRecipe(long), "layers.2.mlp": SiteRecipe()})
    written_out = Recipe({"layers.0.mlp": SiteRecipe(short), "layers.1.mlp": SiteRecipe(long)})
    step = train_step(model, compiled(model, recipe, strict=True), inputs)
    assert_same_step(step, mapped_step(model, written_out, inputs), torch.float64)


def test_a_recipe_is_read_from_its_folder(tmp_path: Path) -> None:
    model, inputs = fp64_decoder(layers=2), batch(61)
    RECIPE.save(tmp_path)
    step = train_step(model, compiled(model, str(tmp_path)), inputs)
    assert_bit_equal(step, train_step(model, compiled(model, RECIPE), inputs))


def test_another_recipe_is_another_compilation() -> None:
    model, inputs = fp64_decoder(layers=2), batch(61)
    other = Recipe({name: SiteRecipe(random_map(WIDTH, 2, seed=20)) for name in RANKS})
    for recipe in (RECIPE, other, RECIPE):
        step = train_step(model, compiled(model, recipe), inputs)
        assert_same_step(step, mapped_step(model, recipe, inputs), torch.float64)


def test_maps_are_neither_trained_nor_saved_with_the_model() -> None:
    """Nor is the recipe moved, whatever is made of its tensors."""
    model, inputs = fp64_decoder(layers=2), batch(61)
    names, digest = list(model.state_dict()), Recipe(RECIPE.sites).digest
    call = compiled(model, RECIPE)
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    for _ in range(2):
        call(**inputs)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert list(model.state_dict()) == names and Recipe(RECIPE.sites).digest == digest
    # With the adapters as they are by now.
    assert_same_step(train_step(model, call, inputs), mapped_step(model, RECIPE, inputs), torch.float64)


def test_a_pass_that_is_disabled_leaves_its_sites_dense() -> None:
    model, inputs = fp64_decoder(layers=2), batch(61)
    with told():
        step = train_step(model, compiled(model, RECIPE, disable=["sparsify_ffn"]), inputs)
    assert_same_step(step, train_step(model, model, inputs), torch.float64)


def test_a_model_without_roles_stays_dense_and_says_so() -> None:
    model, inputs = fp64_decoder(layers=2), {"input_ids": batch(61)["input_ids"]}

    def loss(**inputs: Any) -> Any:
        return (model(**inputs)[1].logsumexp(-1).mean(),)

    with told() as messages:
        call = torch.compile(loss, backend="sparselora", options={"recipe": RECIPE})
        step = [train_step(model, call, inputs) for _ in range(3)][-1]
    assert_same_step(step, train_step(model, loss, inputs), torch.float64)
    assert (
        len(messages) == 1
        and "recipe asks" in messages[0]
        and "nothing tells output tokens from context" in messages[0]
    )


# --- What is refused --------------------------------------------------------------------------------------------------


def refusal(model: nn.Module, recipe: Recipe, inputs: Any = None) -> str:
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as raised:
        compiled(model, recipe)(**(inputs or batch(61)))
    assert isinstance(raised.value.inner_exception, ValueError)
    return str(raised.value.inner_exception)


@pytest.mark.parametrize(("width", "out"), [(WIDTH + 1, WIDTH), (WIDTH, WIDTH - 1)])
def test_a_map_of_another_width_is_refused(width: int, out: int) -> None:
    recipe = Recipe({"layers.1.mlp": SiteRecipe(random_map(width, 2, out=out))})
    message = refusal(fp64_decoder(layers=2), recipe)
    assert f"layers.1.mlp goes from {width} to {out}" in message and f"{WIDTH} to {WIDTH}" in message


def test_a_map_for_attention_is_refused() -> None:
    message = refusal(fp64_decoder(layers=2), Recipe({"layers.1.self_attn": SiteRecipe(random_map(WIDTH, 2))}))
    assert "feed-forward" in message and "layers.1.self_attn" in message


def test_a_map_for_other_weights_is_refused_and_can_be_left_out() -> None:
    model, inputs = fp64_decoder(layers=2), batch(61)
    recipe = with_weights(model)
    with torch.no_grad():
        model.layers[1].mlp.up_proj.base_layer.weight.mul_(1.1)
    message = refusal(model, recipe)
    assert "layers.1.mlp was fitted for other weights" in message and "Recipe.without" in message
    less = recipe.without("layers.1.mlp")
    assert_same_step(train_step(model, compiled(model, less), inputs), mapped_step(model, less, inputs), torch.float64)


def test_a_map_for_these_weights_is_taken_whatever_the_adapters_hold() -> None:
    model, inputs = fp64_decoder(layers=2), batch(61)
    recipe = with_weights(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.mul_(2)
    step = train_step(model, compiled(model, recipe), inputs)
    assert_same_step(step, mapped_step(model, recipe, inputs), torch.float64)


def test_a_map_is_taken_by_the_same_model_in_bf16() -> None:
    recipe = with_weights(fp64_decoder(layers=2))
    narrow = fp64_decoder(layers=2, dtype=torch.bfloat16)
    assert torch.isfinite(compiled(narrow, recipe)(**batch(61))[0])
    assert "other weights" in refusal(fp64_decoder(layers=2, seed=1), recipe)


def test_names_that_match_nothing_are_told() -> None:
    model, inputs = fp64_decoder(layers=2), batch(61)
    recipe = Recipe(RECIPE.sites | {"layers.7.mlp": SiteRecipe(random_map(WIDTH, 2)), "block": SiteRecipe()})
    with told() as messages:
        call = compiled(model, recipe)
        for _ in range(3):
            train_step(model, call, inputs)
    assert len(messages) == 1 and "recipe" in messages[0] and "layers.7.mlp" in messages[0]
    assert "layers.0.mlp" in messages[0].split("Sites there are")[1]


# --- Reports and graphs -----------------------------------------------------------------------------------------------


def test_the_report_shows_maps_and_fewer_flops() -> None:
    model, inputs = fp64_decoder(layers=2), batch(61)
    reports = {
        name: explain(model, **inputs, config={"preset": "none", **options})
        for name, options in {
            "dense": {},
            "wide": {"recipe": random_recipe(WIDTH, dict.fromkeys(RANKS, 8))},
            "maps": {"recipe": RECIPE},
        }.items()
    }
    flops = [report.flops_after for report in reports.values()]
    assert flops == sorted(flops, reverse=True) and len(set(flops)) == 3
    by_name = {site.name: site for site in reports["maps"].sites}
    assert [by_name[name].provider for name in RANKS] == ["map of rank 3", "map of rank 0"]
    assert [(by_name[name].sparsity, by_name[name].kept) for name in RANKS] == [(1.0, 0)] * 2
    assert "map of rank 3" in str(reports["maps"])


@pytest.mark.parametrize("gradient", ["exact", slow("detached")])
def test_nothing_of_a_predictor_is_left_in_the_graph(gradient: str, eager_inductor: Any) -> None:
    model = fp64_decoder(layers=3)
    train_step(model, compiled(model, RECIPE, preset="exact", surrogate_gradient=gradient), batch(61, padding="left"))
    (graph,) = eager_inductor.graphs
    called = set(targets(graph))
    assert {"take_rows", "put_rows"} <= called
    assert not {each for each in called if "channels" in each or "gathered" in each or "scores" in each}
