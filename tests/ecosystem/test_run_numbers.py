"""The numbers of a run: computed by hand from a clock that the test turns, and as a trainer logs them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from models import ALL_TARGETS, batch, tiny_llama, with_lora
from sparse_compile.ecosystem.run_numbers import RunNumbers

CPU = torch.device("cpu")
SITE = SimpleNamespace(sparse=True)


class Turned:
    """A clock that stands still until it is turned."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Turned:
    clock = Turned()
    monkeypatch.setattr("sparse_compile.ecosystem.run_numbers.time", clock)
    return clock


def session(**changes: Any) -> Any:
    report = SimpleNamespace(flops_before=10.0, flops_after=4.0, sites=(SITE,))
    values = {
        "reports": [report], "phase": "dense", "online_maps": {}, "renewals": 0, "window": (2, None),
        "schedule": SimpleNamespace(step=0, total_steps=20), "sparse_steps_left": 10,
        "config": SimpleNamespace(preset="o2", site_option="", dense_from=None),
    }  # fmt: skip
    return SimpleNamespace(**{**values, **changes})


def labels(output: int, of: int = 40) -> Tensor:
    """Labels of which so many tokens are output tokens: those that carry one, and the one that predicts the first."""
    found = torch.full((1, of), -100)
    found[0, of - output + 1 :] = 3
    return found


@pytest.fixture
def take_step(clock: Turned) -> Callable[..., None]:
    def take(
        numbers: RunNumbers, of: Any, phase: str, seconds: float, output: int = 10, new_graph: bool = False
    ) -> None:
        numbers.begin()  # before the first compilation nobody knows that its step will be sparse
        of.phase = phase
        numbers.called_with(labels(output), -100)
        clock.seconds += seconds
        numbers.computed()
        of.phase = "the next step's"
        if new_graph:
            of.reports.append(of.reports[0])
        of.schedule.step += 1
        numbers.end()

    return take


def test_numbers_are_those_of_the_steps_since_the_last_log(take_step: Callable[..., None]) -> None:
    run = session()
    numbers = RunNumbers(run, CPU)
    assert numbers.take() == {}
    take_step(numbers, run, "dense", 30.0, new_graph=True)
    take_step(numbers, run, "dense", 4.0)
    first = numbers.take()
    assert first["sparselora/sparse_steps"] == 0 and first["sparselora/flops"] == 1
    assert first["sparselora/graphs"] == 2
    assert first["sparselora/context"] == pytest.approx(30 / 40)
    # The step that compiled is none of the speed's.
    assert first["sparselora/tokens_per_second_dense"] == pytest.approx(10)
    assert "sparselora/tokens_per_second_sparse" not in first and "sparselora/minutes_left" not in first
    assert first["sparselora/minutes_left_if_dense"] == pytest.approx(18 * 4 / 60)
    for seconds in (2.0, 1.0, 2.0):
        take_step(numbers, run, "sparse", seconds, output=20)
    take_step(numbers, run, "dense", 4.0, output=20)
    second = numbers.take()
    assert second["sparselora/sparse_steps"] == pytest.approx(3 / 4)
    assert second["sparselora/flops"] == pytest.approx(1 / 4 + 3 / 4 * 4 / 10)
    assert second["sparselora/context"] == pytest.approx(1 / 2)
    assert second["sparselora/tokens_per_second_sparse"] == pytest.approx(20)
    run_left = run.schedule.total_steps - run.schedule.step
    assert second["sparselora/minutes_left"] == pytest.approx(((run_left - 10) * 4 + 10 * 2) / 60)
    assert numbers.take() == {}


def test_maps_and_renewals_are_logged(take_step: Callable[..., None]) -> None:
    run = session(online_maps={name: SimpleNamespace(error=error) for name, error in (("a", 0.2), ("b", 0.4))})
    numbers = RunNumbers(run, CPU)
    run.renewals = 3
    take_step(numbers, run, "sparse", 1.0)
    found = numbers.take()
    assert found["sparselora/map_error"] == pytest.approx(0.3) and found["sparselora/renewals"] == 3


def test_without_labels_or_a_length_those_numbers_are_left_out(clock: Turned) -> None:
    run = session(schedule=SimpleNamespace(step=0, total_steps=None), sparse_steps_left=None)
    numbers = RunNumbers(run, CPU)
    numbers.begin()
    clock.seconds += 1
    numbers.end()
    assert set(numbers.take()) == {f"sparselora/{name}" for name in ("sparse_steps", "flops", "graphs", "renewals")}


@pytest.mark.parametrize(
    ("changes", "output", "sparse_seconds", "said"),
    [
        ({}, 10, 1.0, "were saved; steps with compilations took 30 s. To try next: preset 'auto' (docs/recipes.md)"),
        ({}, 30, 1.0, "Of the tokens 25% are context, and nothing is saved on the others"),
        ({}, 10, 4.0, "are hardly faster: `sparse_compile.explain(model, **batch)` says what stays dense"),
        ({"config": SimpleNamespace(preset="auto", site_option="", dense_from=None)}, 10, 1.0,
         "To try next: end_step=0.85, so that adapters get used to a dense context (docs/recipes.md)"),
        ({"config": SimpleNamespace(preset="auto", site_option="", dense_from=0.85)}, 10, 1.0, "took 30 s."),
    ],
)  # fmt: skip
def test_the_last_line_says_what_was_saved_and_what_to_try(
    take_step: Callable[..., None], changes: Any, output: int, sparse_seconds: float, said: str
) -> None:
    run = session(**changes)
    numbers = RunNumbers(run, CPU)
    take_step(numbers, run, "dense", 30.0, output, new_graph=True)
    take_step(numbers, run, "dense", 4.0, output)
    take_step(numbers, run, "sparse", sparse_seconds, output)
    numbers.take()
    line = numbers.closing_line()
    begin = (
        f"1 of 3 steps were sparse: {sparse_seconds:g} s each, where a dense one takes 4 s (medians), so that about "
    )
    assert line.startswith(begin) and line.endswith(said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"window": None}, "none of 1 steps was sparse. The options give the sparse phase as fractions of a run whose"),
        ({"reports": []}, "none of 1 steps was sparse. No site is sparse: `sparse_compile.explain(model, **batch)`"),
        ({}, "none of 1 steps was sparse. The run ended before the sparse phase"),
    ],
)
def test_the_last_line_says_why_no_step_was_sparse(take_step: Callable[..., None], changes: Any, said: str) -> None:
    run = session(**changes)
    numbers = RunNumbers(run, CPU)
    assert numbers.closing_line() == ""
    take_step(numbers, run, "dense", 1.0)
    assert numbers.closing_line().startswith(said)


def test_on_a_device_time_is_that_of_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Event:
        def __init__(self, device: torch.device, *, enable_timing: bool) -> None:
            assert device.type == "cuda" and enable_timing
            made.append(self)

        def record(self) -> None:
            self.milliseconds = 1500.0 * len(made)
            self.waited = False

        def synchronize(self) -> None:
            self.waited = True

        def elapsed_time(self, end: Event) -> float:
            assert end.waited
            return end.milliseconds - self.milliseconds

    monkeypatch.setattr(torch, "Event", Event)
    run = session()
    numbers = RunNumbers(run, torch.device("cuda", 0))
    numbers.begin()
    numbers.called_with(labels(10), -100)
    numbers.end()
    assert not any(each.waited for each in made)  # nothing is waited for before the numbers are asked for
    assert numbers.take()["sparselora/tokens_per_second_dense"] == pytest.approx(40 / 1.5)


@pytest.mark.parametrize(("start", "sparse"), [(0.33, [0, 1, 1]), (0, [1, 1, 1])])
def test_a_trainer_logs_them_for_all_its_callbacks(
    tmp_path: Path, eager_inductor: Any, caplog: pytest.LogCaptureFixture, start: float, sparse: list[int]
) -> None:
    transformers = pytest.importorskip("transformers")
    from sparse_compile import SparseLoRACallback

    class Reporting(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        """Stands where those of TensorBoard and W&B stand: before a user's own."""

        seen: list[dict[str, Any]] = []  # noqa: RUF012

        def on_log(self, *args: Any, logs: dict[str, Any], **kwargs: Any) -> None:
            self.seen.append(dict(logs))

    torch.manual_seed(0)
    model = with_lora(tiny_llama(layers=2), ALL_TARGETS)
    rows = batch(97, rows=8, length=12)
    data = [{name: values[i] for name, values in rows.items()} for i in range(8)]
    model.compile(backend="sparselora", options={"preset": "o2", "start_step": start, "layer_sparsity": {"mlp": 0.5}})
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=2, report_to=[], save_strategy="no",
        logging_steps=2, disable_tqdm=True, use_cpu=True, gradient_accumulation_steps=2,
    )  # fmt: skip
    callbacks = [Reporting(), SparseLoRACallback()]
    before = transformers.Trainer.log
    trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=callbacks)
    with caplog.at_level("INFO", logger="sparse_compile"):
        trainer.train()
    assert transformers.Trainer.log is before
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["sparselora/sparse_steps"] for entry in logged] == sparse
    assert [entry["sparselora/sparse_steps"] for entry in Reporting.seen if "loss" in entry] == sparse
    mask = rows["labels"] != -100
    mask[:, :-1] |= mask[:, 1:].clone()
    assert logged[-1]["sparselora/context"] == pytest.approx(1 - float(mask.float().mean()), abs=0.1)
    assert logged[1]["sparselora/flops"] == logged[2]["sparselora/flops"] < 1
    assert (logged[0]["sparselora/flops"] == 1) == (sparse[0] == 0)
    assert all(entry["sparselora/graphs"] == 1 for entry in logged)
    assert f"{2 * sum(sparse)} of 6 steps were sparse" in caplog.records[-1].message
