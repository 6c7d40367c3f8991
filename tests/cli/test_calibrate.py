"""`sparselora calibrate`: a recipe in a folder, or the reason why there is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparse_compile import Recipe


@pytest.fixture
def maps_that_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have blocks as narrow as a test's cost more than a map of them."""
    monkeypatch.setattr("sparse_compile.cli.calibrate.calibrate", _cheap)


def _cheap(model: Any, batches: Any, **goal: Any) -> Any:
    from sparse_compile.calibration.calibrate import calibrate

    return calibrate(model, batches, ranks=(0, 2), max_forwards=40, **goal)


def test_a_recipe_is_saved(
    run: Callable[..., Any], checkpoint: Path, rows: Path, tmp_path: Path, maps_that_pay: None
) -> None:
    arguments = ("--model", checkpoint, "--data", rows, "--batch-size", 4, "--out", tmp_path / "recipe")
    result = run("calibrate", *arguments, "--flops", "0.99", "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["goal"] == {"name": "flops", "value": 0.99} and data["unit"] == "flops"
    recipe = Recipe.load(tmp_path / "recipe")
    assert set(recipe.sites) == {site["name"] for site in data["sites"] if site["chosen"]} != set()
    assert "calibrate:" in result.stderr  # the bar


@pytest.mark.slow
def test_a_goal_out_of_reach_saves_nothing(
    run: Callable[..., Any], checkpoint: Path, rows: Path, tmp_path: Path, maps_that_pay: None
) -> None:
    arguments = ("--model", checkpoint, "--data", rows, "--batch-size", 4, "--out", tmp_path / "recipe")
    result = run("calibrate", *arguments, "--flops", "0.01")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "sparselora: no recipe is saved, for goal flops=0.01 is not met: " in result.stderr
    assert not (tmp_path / "recipe").exists()


def test_a_file_is_no_folder_for_a_recipe(run: Callable[..., Any], checkpoint: Path, rows: Path) -> None:
    result = run("calibrate", "--model", checkpoint, "--data", rows, "--out", rows)
    assert result.exit_code == 1 and f"--out {rows} is a file: name a folder" in result.stderr
