"""What a run has fitted, as a recipe: another run that starts from it takes the same step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models import DecoderConfig, batch, fp64_decoder
from oracle import assert_same_step, train_step
from sparse_compile import Recipe, Schedule, recipe_of
from sparse_compile.training.schedule import DENSE
from sparse_compile.training.session import session_for

pytestmark = pytest.mark.usefixtures("eager_inductor", "maps_pay")

VOCAB = DecoderConfig().vocab


def trained_with_maps(steps: int, **options: Any) -> tuple[nn.Module, Any]:
    """Take some steps under preset `auto`; return the model and its compiled call."""
    model = fp64_decoder(layers=4)
    options = {"preset": "auto", "start_step": 4, "dense_every": 4, "strict": True, **options}
    call = torch.compile(model, backend="sparselora", dynamic=False, options=options)
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.05)
    for seed in range(steps):
        call(**batch(VOCAB, rows=8, seed=seed))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, call


@pytest.mark.parametrize("depth", [0.5, 1.0])
def test_a_run_that_starts_from_the_recipe_takes_the_same_step(depth: float, tmp_path: Path) -> None:
    model, call = trained_with_maps(6, context_exit=depth)
    found = recipe_of(model)
    found.save(tmp_path)
    inputs = batch(VOCAB, rows=8, seed=99)
    expected = train_step(model, call, inputs)
    torch.compiler.reset()
    options = {"recipe": Recipe.load(tmp_path), "start_step": 0, "strict": True}
    again = torch.compile(model, backend="sparselora", dynamic=False, options=options)
    assert_same_step(train_step(model, again, inputs), expected, torch.float64)
    assert (found.exit is None) == (depth == 1.0)
    assert (found.dense_every, found.end_step) == (4, None)
    if found.exit is not None:
        assert (found.exit.site, *found.exit.maps) == ("layers.2.self_attn", "layers.3.self_attn")


def test_the_recipe_keeps_what_the_run_fits_later_out() -> None:
    model, call = trained_with_maps(6)
    before = recipe_of(model)
    for seed in range(6, 10):
        call(**batch(VOCAB, rows=8, seed=seed))[0].backward()
        torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.05).step()
    assert recipe_of(model) != before


def test_a_run_follows_the_schedule_of_its_recipe() -> None:
    model, _ = trained_with_maps(6, end_step=30)
    found = recipe_of(model)
    assert (found.dense_every, found.end_step) == (4, 30)
    torch.compiler.reset()
    recipe = found.with_schedule(dense_every=3, end_step=7)
    assert dense_steps(model, {"recipe": recipe, "start_step": 0, "strict": True}, 8) == [2, 5, 7]


def dense_steps(model: nn.Module, options: dict[str, Any], steps: int) -> list[int]:
    """Take some steps of a run that begins; return the dense ones."""
    schedule = Schedule()
    call = torch.compile(model, backend="sparselora", dynamic=False, options={**options, "schedule": schedule})
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer, found = torch.optim.SGD(trained, lr=0.0), []
    for step in range(steps):
        call(**batch(VOCAB, rows=8, seed=step))[0].backward()
        if session_for(trained).phase == DENSE:
            found.append(step)
        optimizer.step()
        optimizer.zero_grad()
    return found


@pytest.mark.slow
def test_a_recipe_of_other_weights_is_refused(tmp_path: Path) -> None:
    model, _ = trained_with_maps(6, context_exit=0.5)
    recipe_of(model).save(tmp_path)
    torch.compiler.reset()
    with torch.no_grad():
        model.layers[2].mlp.up_proj.base_layer.weight.mul_(1.5)  # of a block that the exit's map imitates
    again = torch.compile(model, backend="sparselora", options={"recipe": str(tmp_path), "start_step": 0})
    with pytest.raises(Exception, match=r"layers\.3\.self_attn was fitted for other weights"):
        again(**batch(VOCAB, rows=8))


def test_without_maps_there_is_no_recipe() -> None:
    with pytest.raises(ValueError, match="no run of this model fits maps"):
        recipe_of(fp64_decoder())


def test_before_the_first_fit_there_is_no_recipe() -> None:
    model, _ = trained_with_maps(1)
    with pytest.raises(ValueError, match="not fitted yet: the run needs more dense steps"):
        recipe_of(model)
