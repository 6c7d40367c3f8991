"""Arms that step in turns: what is timed, what is not, and what is no measurement."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparse_compile.cli import paired
from sparse_compile.cli.paired import Spread, paired_ratio, spread, take_turns, training_step

# --- Statistics -------------------------------------------------------------------------------------------------------


def test_spread() -> None:
    assert spread([5.0]) == Spread(5.0, 5.0, 5.0)
    assert spread([6.0, 1.0, 3.0, 2.0, 5.0, 4.0]) == Spread(3.5, 2.0, 5.0)


def test_ratios_are_taken_within_rounds() -> None:
    # The machine slowed down tenfold within the third round; the ratio of the medians would be 0.2.
    peer, arm = [2.0, 2.0, 2.0, 20.0, 20.0], [1.0, 1.0, 10.0, 10.0, 10.0]
    assert paired_ratio(peer, arm) == Spread(2.0, pytest.approx(1.64), 2.0)
    with pytest.raises(ValueError, match="longer"):
        paired_ratio([1.0], [1.0, 1.0])


# --- Turns ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stand in for Dynamo's count of compiled graphs: the only element of the list."""
    count = [0]
    monkeypatch.setattr(paired, "load_compiler", lambda: None)
    monkeypatch.setattr(paired, "compiled_graphs", lambda: count[0])
    return count


def recorder(name: str, order: list[str], compiles: Callable[[int], None] = lambda call: None) -> Callable[[], float]:
    def step() -> float:
        compiles(order.count(name))
        order.append(name)
        return float(order.count(name))

    return step


def test_arms_step_in_turns_and_warm_up_is_not_measured(graphs: list[int], tmp_path: Path) -> None:
    def compiles(call: int) -> None:
        graphs[0] += call == 0

    order: list[str] = []
    steps = {"eager": recorder("eager", order), "o2": recorder("o2", order, compiles)}
    times = take_turns(steps, tmp_path, 3, 2, eager=["eager"], after_round=lambda: order.append("|"))
    assert order == ["eager", "o2", "|"] * (1 + 2 + 3)
    assert [len(times[name].steps) for name in steps] == [3, 3]
    assert [times[name].loss for name in steps] == [1.0, 1.0]  # of the first step
    assert [times[name].graphs for name in steps] == [0, 1]


def test_an_arm_that_was_not_compiled_is_an_error(graphs: list[int], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="o2 compiled nothing"):
        take_turns({"o2": recorder("o2", [])}, tmp_path, rounds=1, warm_up=0)


def test_a_recompilation_in_a_measured_round_is_an_error(graphs: list[int], tmp_path: Path) -> None:
    def compiles(call: int) -> None:
        graphs[0] += call in (0, 2)

    with pytest.raises(RuntimeError, match="compiled again"):
        take_turns({"o2": recorder("o2", [], compiles)}, tmp_path, rounds=2, warm_up=1)
    times = take_turns({"o2": recorder("o2", [], compiles)}, tmp_path, rounds=2, warm_up=2)
    assert times["o2"].graphs == 1  # of the first step alone


def test_each_first_call_has_caches_of_its_own(
    graphs: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "before")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.delenv("SPARSELORA_CACHE_DIR")
    seen = []

    def compiles(call: int) -> None:
        graphs[0] += call == 0
        names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "SPARSELORA_CACHE_DIR")
        seen.append(tuple(os.environ.get(name) for name in names))

    steps = {name: recorder(name, [], compiles) for name in ("inductor", "o2")}
    take_turns(steps, tmp_path, rounds=1, warm_up=0)
    assert len(set(seen[:2])) == 2 and all(str(tmp_path) in folder for pair in seen[:2] for folder in pair)
    assert seen[2:] == [("before", None, None)] * 2


def test_a_step_trains_on_one_batch_after_the_other() -> None:
    class Recorder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))
            self.seen: list[float] = []

        def forward(self, x: torch.Tensor) -> SimpleNamespace:
            self.seen.append(float(x))
            return SimpleNamespace(loss=self.weight * x)

    model = Recorder()
    step = training_step(model, {"x": torch.tensor(1.0)}, {"x": torch.tensor(2.0)})
    losses = [step() for _ in range(3)]
    assert model.seen == [1.0, 2.0, 1.0]
    assert losses[0] == 1.0 > losses[2] and model.weight.grad is None
