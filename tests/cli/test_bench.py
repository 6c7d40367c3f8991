"""`sparselora bench`: three arms on the user's batches, and no measurement of anything else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_compile.torch_private.modules import backend_name, backend_options


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stand in for the clock and the compilers: record the arms, and return times of theirs."""
    from sparse_compile.cli.paired import ArmTimes

    seen: list[dict[str, Any]] = []

    def training_step(model: Any, *batches: Any) -> Any:
        return model, batches

    def take_turns(steps: Any, folder: Path, rounds: int, warm_up: int, after_round: Any) -> Any:
        seen.append({"steps": steps, "rounds": rounds, "warm_up": warm_up})
        seconds = iter((0.4, 0.2, 0.1))
        return {name: ArmTimes(9.0, (next(seconds),) * rounds, 1.5, 1) for name in steps}

    monkeypatch.setattr("sparse_compile.cli.bench.training_step", training_step)
    monkeypatch.setattr("sparse_compile.cli.bench.take_turns", take_turns)
    return seen


def parameters(model: Any, *, trained: bool) -> Iterator[int]:
    return (each.data_ptr() for each in model.parameters() if each.requires_grad == trained)


@pytest.mark.slow
def test_the_arms_share_frozen_weights_and_batches(
    run: Callable[..., Any], checkpoint: Path, rows: Path, turns: list[dict[str, Any]]
) -> None:
    arguments = ("--model", checkpoint, "--data", rows, "--batch-size", 4, "--batches", 2, "--rounds", 3)
    result = run("bench", *arguments, "--preset", "o2", "--json")
    assert result.exit_code == 0, result.stderr
    (seen,) = turns
    models = {name: model for name, (model, _) in seen["steps"].items()}
    assert {name: backend_name(model) for name, model in models.items()} == {
        "dense": "inductor", "exact": "sparselora", "o2": "sparselora"
    }  # fmt: skip
    assert backend_options(models["o2"]) == {"preset": "o2", "start_step": 0}
    frozen, trained = ([set(parameters(each, trained=kind)) for each in models.values()] for kind in (False, True))
    assert frozen[0] == frozen[1] == frozen[2] != set()
    assert not trained[0] & trained[1] and not trained[1] & trained[2]
    assert len({id(batches[0]["input_ids"]) for _, batches in seen["steps"].values()}) == 1
    assert (seen["rounds"], seen["warm_up"]) == (3, 4)
    arms = json.loads(result.stdout)["arms"]
    assert [round(arm["against_dense"]["median"], 3) for arm in arms.values()] == [1.0, 2.0, 4.0]
    assert arms["dense"]["flops"] > arms["exact"]["flops"] > 0


def test_the_table(run: Callable[..., Any], checkpoint: Path, rows: Path, turns: list[dict[str, Any]]) -> None:
    result = run("bench", "--model", checkpoint, "--data", rows, "--preset", "exact")
    assert result.exit_code == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if "x" in line and "│" in line]
    assert [line.split("│")[1].strip() for line in lines] == ["dense", "exact"]
    assert "400.0" in lines[0] and "2.00x" in lines[1]


@pytest.mark.slow
def test_steps_are_timed_for_real(run: Callable[..., Any], checkpoint: Path, rows: Path) -> None:
    arguments = ("--model", checkpoint, "--data", rows, "--batch-size", 2, "--batches", 2, "--rounds", 2)
    result = run("bench", *arguments, "--preset", "exact", "--json")
    assert result.exit_code == 0, result.stderr
    arms = json.loads(result.stdout)["arms"]
    losses = [arm["first_loss"] for arm in arms.values()]
    assert losses == pytest.approx([losses[0]] * 2, rel=1e-4) and torch.tensor(losses).isfinite().all()
    assert all(arm["step_seconds"]["median"] > 0 for arm in arms.values())
