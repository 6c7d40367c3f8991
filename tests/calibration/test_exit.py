"""The exit of context as a candidate: its statistics, its costs, its losses, and the recipe in training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calibrations import Batches, batches_of, blocks_near_a_map, oracle_loss, recipe_sites, run
from mapped import random_map
from models import ATTENTION_TARGETS, batch, fp64_decoder, tiny_llama, with_lora
from oracle import assert_same_step, train_step
from sparse_compile import Recipe, SparseLoRAConfig, explain
from sparse_compile.calibration import costs, fits, timing
from sparse_compile.calibration.calibrate import Calibration
from sparse_compile.calibration.costs import cost_in_flops, samples_of
from sparse_compile.calibration.fits import fit_sites, passes_of
from sparse_compile.calibration.levels import EXIT
from sparse_compile.calibration.taps import TappedModel
from sparse_compile.options.recipe import ExitRecipe, SiteRecipe
from sparse_compile.reference import masked_dense, output_mask_from_labels
from sweeps import sweep
from tolerances import assert_close_rms

BLOCKS = [f"layers.{i}.self_attn" for i in range(4)]


@pytest.fixture(autouse=True)
def steady_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have attention take a tenth of a second, as a layer takes one (`conftest.py`)."""
    monkeypatch.setattr(costs, "attention_seconds", lambda *_, **__: 0.1)


def with_exit(model: nn.Module, batches: Batches, **arguments: Any) -> Calibration:
    return run(model, batches, config=None, **arguments)


def tapped(model: nn.Module, inputs: dict[str, Tensor]) -> TappedModel:
    found = TappedModel(model, SparseLoRAConfig())
    found(inputs)
    return found


def exit_of(*ranks: int, width: int = 32, at: int = 1) -> ExitRecipe:
    """An exit with random maps, by the ranks of the blocks behind."""
    maps = {BLOCKS[at + 1 + i]: SiteRecipe(random_map(width, rank, seed=i)) for i, rank in enumerate(ranks)}
    return ExitRecipe(BLOCKS[at], maps)


# --- Taps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [{}, {"padding": "left"}, {"packed": True}], ids=["ragged", "left", "packed"])
def test_a_tapped_model_with_an_exit_returns_what_the_oracle_returns(shape: dict[str, Any]) -> None:
    model, inputs = fp64_decoder(layers=4), batch(61, **shape)
    call = tapped(model, inputs)
    dense = call(inputs)[0]
    for exit_ in (exit_of(3, 0), exit_of(4, at=2), exit_of(at=3)):
        sites = {"layers.0.mlp": SiteRecipe(random_map(32, 2, seed=9))}
        for recipe in (Recipe({}, exit=exit_), Recipe(sites, exit=exit_)):
            call.put({name: each.surrogate for name, each in recipe.sites.items()}, recipe.exit)
            found = call(inputs)[0]
            with masked_dense(recipe_sites(model, recipe), output_mask_from_labels(inputs["labels"])), torch.no_grad():
                expected = model(**inputs)[0]
            assert_close_rms(found, expected)
            exact = not recipe.sites and not exit_.maps
            assert (abs(float(found - dense)) < 1e-12) == exact, "an exit before the last block alone changes nothing"
    call.put({})
    assert torch.equal(call(inputs)[0], dense)


def test_rows_are_what_the_exit_reads_and_how_the_stream_changes() -> None:
    model, inputs = fp64_decoder(layers=4), batch(61, padding="left")
    call, seen = tapped(model, inputs), {}
    pair = BLOCKS[1], BLOCKS[3]
    call.collect({}, {pair: lambda x, y: seen.update(x=x, y=y)})
    call(inputs)
    call.collect({})
    streams: dict[str, Tensor] = {}
    hooks = [
        model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda _, args: streams.update(x=args[0])),
        *(
            model.layers[i].register_forward_pre_hook(lambda _, args, name=i: streams.update({str(name): args[0]}))
            for i in (1, 3)
        ),
    ]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    context = ~output_mask_from_labels(inputs["labels"]) & inputs["attention_mask"].bool()
    assert_close_rms(seen["x"], streams["x"][context])
    assert_close_rms(seen["y"], (streams["3"] - streams["1"])[context])
    assert not call._stream.streams and not call._stream.features, "no activation outlives its forward"


# --- Statistics -------------------------------------------------------------------------------------------------------


def test_statistics_come_of_the_forwards_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fp64_decoder(layers=4)
    batches = batches_of(model, count=4)
    call = tapped(model, batches[0])
    assert [(each.site, each.later) for each in call.exits.values()] == [
        (BLOCKS[3], ()), (BLOCKS[2], (BLOCKS[3],)), (BLOCKS[1], (BLOCKS[2], BLOCKS[3])),
    ]  # fmt: skip
    passes, forwards = passes_of(call), []
    found = fit_sites(call, passes, batches[:3], batches[3:], (0, 8), lambda: forwards.append(1))
    assert len(passes) == 1 and len(forwards) == 4
    assert {name: list(each) for name, each in found.exits.items()} == {
        BLOCKS[3]: [], BLOCKS[2]: [BLOCKS[3]], BLOCKS[1]: [BLOCKS[2], BLOCKS[3]],
    }  # fmt: skip
    errors = found.exit_errors(BLOCKS[1], (0, 8))
    assert 0 < errors[8] < errors[0] and found.exit_errors(BLOCKS[3], (0,)) == {0: 0.0}


@pytest.mark.parametrize(("pairs", "exits"), [(3, 3), (2, 2), (1, 1), (0, 1)])
def test_memory_bounds_the_exits(pairs: int, exits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sites decide how many runs there are, and exits that have no room in them are left out."""
    model = fp64_decoder(layers=4)
    call = tapped(model, batch(61))
    pair = 2 * 4 * 32 * 64
    monkeypatch.setattr(fits, "_MEMORY_BYTES", 4 * pair)
    assert [len(each.sites) for each in passes_of(call)] == [4]
    monkeypatch.setattr(fits, "_pairs_at_a_time", lambda _: pairs)
    (one,) = passes_of(call)
    assert len(call.exits) == exits and next(iter(call.exits)) == BLOCKS[3]
    assert len(one.pairs) == sum(len(each.later) for each in call.exits.values()) <= pairs


def test_a_deep_model_has_exits_at_even_distances() -> None:
    call = tapped(fp64_decoder(layers=11, hidden=8, ffn=8, heads=1, kv_heads=1), batch(61))
    assert [each.split(".")[1] for each in call.exits] == ["10", "8", "6", "4", "2"]


# --- Costs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", sweep(("sdpa", "eager"), "sdpa"))
def test_flops_are_those_that_reports_have(attention: str) -> None:
    """Between two exits: the end of the model runs on rows of the loss in any case."""
    model = fp64_decoder(layers=4, adapters=("k_proj", "v_proj"), attention=attention)
    inputs = batch(61)
    call = tapped(model, inputs)
    found = cost_in_flops(call, inputs, samples_of(call, inputs), {}, (0, 4))
    left = {}
    for block, ranks in ((1, (4, 4)), (2, (4,)), (3, ())):
        recipe = Recipe({}, exit=exit_of(*ranks, at=block))
        left[block] = explain(model, config={"preset": "exact", "recipe": recipe}, **inputs).flops_after
    saved = {block: found.dense * found.exits[BLOCKS[block]][4] for block in left}
    for block in (1, 2):
        assert saved[block] - saved[block + 1] == pytest.approx(left[block + 1] - left[block], rel=1e-6)
    assert 0 < saved[3] < saved[2] < saved[1] < found.dense


def test_seconds_are_what_was_timed_and_stand_in_the_table(tmp_path: Path) -> None:
    """Of a step of ten seconds: each block and layer takes one for all tokens, attention a tenth."""
    model = blocks_near_a_map(layers=3)
    batches = batches_of(model)
    found = with_exit(model, batches, ranks=(4,))
    deep, early = found.exits
    share = {round(float((~output_mask_from_labels(each["labels"])).double().mean()), 9) for each in batches}
    # A feed-forward block, a query and an output layer, and attention.
    (of_context,) = {each for each in share if 10 * deep.saved == pytest.approx(3.1 * each)}
    assert 10 * early.saved == pytest.approx(2 * 3.1 * of_context - 0.05 - 0.002 * 4)
    text = str(found)
    assert f"which leave before {BLOCKS[1]}: held-out loss" in text
    rows = {line.split("  ")[0]: line for line in text.splitlines() if line.startswith(EXIT)}
    assert list(rows) == [f"{EXIT} before {name}" for name in BLOCKS[2:0:-1]]
    assert rows[f"{EXIT} before {BLOCKS[1]}"].endswith("yes") and rows[f"{EXIT} before {BLOCKS[2]}"].endswith("no")
    pytest.importorskip("matplotlib")
    found.plot(tmp_path / "curve.svg")
    assert (tmp_path / "curve.svg").stat().st_size > 1000


def test_attention_takes_some_time_on_this_machine() -> None:
    call = tapped(fp64_decoder(layers=2), batch(61))
    (part,) = call.attention.values()
    like, context = torch.zeros(3, 16, 32), torch.ones(3, 16, dtype=torch.bool)
    assert timing.attention_seconds(part, like, context, allowed=0.1) > 0


# --- The choice -------------------------------------------------------------------------------------------------------


GOALS: dict[str, dict[str, float]] = {
    "no loss": {"loss_budget": 0.0},
    "some": {"loss_budget": 0.05},
    "any": {"loss_budget": 100.0},
    "flops": {"flops": 0.9},
}


@pytest.mark.parametrize("kind", sweep(GOALS, "flops"))
def test_a_recipe_costs_what_is_said(kind: str) -> None:
    goal = GOALS[kind]
    model = blocks_near_a_map(layers=4)
    batches = batches_of(model)
    found = with_exit(model, batches, ranks=(24,), **goal)
    exit_ = found.recipe.exit
    assert exit_ is not None and found.reason == ""
    assert found.rise == pytest.approx(oracle_loss(model, found.recipe, batches) - found.loss, abs=1e-10)
    assert found.rise <= goal.get("loss_budget", 100)
    block = BLOCKS.index(exit_.site)
    assert all(int(name.split(".")[1]) < block for name in found.recipe.sites), "no map is behind the exit"
    assert list(exit_.maps) == BLOCKS[block + 1 :]
    (point,) = (each for each in found.curve if each.chosen)
    assert point.exit == exit_.site and point.sites == dict.fromkeys(found.recipe.sites, 24)
    assert [each.name for each in found.exits if each.chosen] == [exit_.site]
    assert [each.name for each in found.exits] == BLOCKS[:0:-1]
    assert [each.saved for each in found.exits] == sorted(each.saved for each in found.exits)
    assert found.exits[0].rise == pytest.approx(0, abs=1e-12) and found.exits[0].error == 0
    assert all(0 < each.error < 1 for each in found.exits[1:])
    if goal == {"loss_budget": 0.0}:
        assert exit_.site == BLOCKS[3], "an exit before the last block alone costs nothing"
    if goal == {"loss_budget": 100.0}:
        assert exit_.site == BLOCKS[1]


# --- The recipe in training -------------------------------------------------------------------------------------------


def test_a_compiled_step_has_the_loss_that_was_measured(tmp_path: Path, eager_inductor: Any) -> None:
    model = blocks_near_a_map(layers=4)
    batches = batches_of(model)
    found = with_exit(model, batches, ranks=(8,))
    assert len(found.recipe.sites) == 1 and found.recipe.exit is not None and len(found.recipe.exit.maps) == 2
    found.recipe.save(tmp_path)
    assert Recipe.load(tmp_path) == found.recipe
    options = {"recipe": str(tmp_path), "start_step": 0, "strict": True}
    call = torch.compile(model, backend="sparselora", options=options, dynamic=False)
    held_out = [each for place, each in enumerate(batches) if place % 4 == 1]
    tokens = [int((each["labels"][:, 1:] != -100).sum()) for each in held_out]
    steps = [train_step(model, call, each) for each in held_out]
    with masked_dense(recipe_sites(model, found.recipe), output_mask_from_labels(held_out[0]["labels"])):
        assert_same_step(steps[0], train_step(model, model, held_out[0]), torch.float64)
    loss = sum(float(step.loss) * count for step, count in zip(steps, tokens, strict=True)) / sum(tokens)
    assert loss - found.loss == pytest.approx(found.rise, abs=1e-10)
    assert abs(found.rise) > 1e-4


@pytest.mark.slow
def test_a_llama(tmp_path: Path, eager_inductor: Any) -> None:
    model = with_lora(tiny_llama(layers=3), ATTENTION_TARGETS, dropout=0.3)
    found = with_exit(model, [batch(97, padding="left", seed=seed) for seed in range(4)], ranks=(2, 8))
    assert found.recipe.exit is not None and found.declined == {}
    options = {"recipe": found.recipe, "start_step": 0, "strict": True}
    call = torch.compile(model, backend="sparselora", options=options)
    inputs, seed = batch(97, padding="left"), 3
    with masked_dense(recipe_sites(model, found.recipe), output_mask_from_labels(inputs["labels"])):
        expected = train_step(model, model, inputs, seed)
    assert_same_step(train_step(model, call, inputs, seed), expected, torch.float32)


# --- What context cannot leave ----------------------------------------------------------------------------------------


class ReturnsHidden(nn.Module):
    """A decoder that also returns what its second block returns."""

    def __init__(self) -> None:
        super().__init__()
        self.model = fp64_decoder(layers=3)

    def forward(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        seen: list[Tensor] = []
        handle = self.model.layers[1].register_forward_hook(lambda _, args, output: seen.append(output))
        outputs = self.model(**inputs)
        handle.remove()
        return (*outputs, *seen)


class WithoutAttention(nn.Module):
    """A decoder whose blocks are feed-forward blocks alone."""

    def __init__(self) -> None:
        super().__init__()
        self.model = fp64_decoder(layers=2)
        for layer in self.model.layers:
            layer.self_attn.forward = lambda x, *_: torch.zeros_like(x)

    def forward(self, **inputs: Tensor) -> Any:
        return self.model(**inputs)


DECLINED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "hidden states": (ReturnsHidden, {}, "reads the residual stream of all tokens"),
    "no attention": (WithoutAttention, {}, "the model has 0 attention blocks"),
    "one block": (lambda: fp64_decoder(layers=1), {}, "the model has 1 attention blocks"),
    "keep_logits": (lambda: fp64_decoder(layers=2), {"keep_logits": True}, "keep_logits asks for every row"),
    "disabled": (lambda: fp64_decoder(layers=2), {"disable": {"exit_context"}}, "exit_context is disabled"),
}


@pytest.mark.parametrize("name", sweep(DECLINED, "hidden states", "no attention"))
def test_where_context_cannot_leave_the_reason_is_told_and_blocks_get_maps(name: str, said: list[str]) -> None:
    make, options, reason = DECLINED[name]
    model = make()
    batches = batches_of(model)
    found = run(model, batches, config=options)
    assert found.recipe.exit is None and found.exits == () and len(found.recipe.sites) >= 1
    assert reason in found.declined[EXIT] and f"{EXIT}: {found.declined[EXIT]}" in str(found)
    assert [line for line in said if "context is not to leave" in line] == [
        f"context is not to leave in this model: {found.declined[EXIT]}"
    ]
    expected = run(model, batches)
    assert found.recipe == expected.recipe and found.rise == expected.rise


def test_where_no_exit_is_wanted_none_is_tried_and_nothing_said(said: list[str]) -> None:
    model = fp64_decoder(layers=3)
    found = run(model, batches_of(model), config={"context_exit": 1})
    assert found.recipe.exit is None and found.exits == ()
    assert not [line for line in said if "leave" in line]
