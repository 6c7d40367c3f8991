"""The trainer's callback and the schedule."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from noting_model import DENSE, NO_UNEXPECTED_WARNING, SPARSE, owned
from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.training.schedule import Schedule
from sparse_compile.training.session import session_for

pytestmark = NO_UNEXPECTED_WARNING


class Recording(nn.Module):
    """A model that a trainer can train; its compiled forward notes (step, phase) in `phases`."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.phases: list[tuple[int, str]] = []

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.linear(x).square().mean()}


class TestCallback:
    TOTAL = 8

    @pytest.fixture(autouse=True)
    def _transformers(self) -> None:
        pytest.importorskip("transformers")
        pytest.importorskip("accelerate")

    def _trainer(self, model: nn.Module, folder: Path, **arguments: Any) -> Any:
        from transformers import Trainer, TrainingArguments

        from sparse_compile.ecosystem.callback import SparseLoRACallback

        settings = {
            "max_steps": self.TOTAL, "per_device_train_batch_size": 2, "save_strategy": "no", "report_to": [],
            "disable_tqdm": True, "use_cpu": True, "logging_strategy": "no", **arguments,
        }  # fmt: skip
        data = [{"x": torch.ones(3)} for _ in range(2 * self.TOTAL)]
        return Trainer(
            model,
            TrainingArguments(output_dir=str(folder), **settings),
            train_dataset=data,
            callbacks=[SparseLoRACallback()],
        )

    def _compiled(self, model: Recording, **options: Any) -> Recording:
        """Compile in place with a backend that keeps the session as ours does, and records phases."""

        def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            trained = [value for value in inputs if isinstance(value, nn.Parameter) and value.requires_grad]
            session = session_for(trained, SparseLoRAConfig(**options))

            def run(*args: Any) -> Any:
                model.phases.append((session.schedule.step, session.phase))
                session.note_training_forward("graph")
                return gm(*args)

            return run

        torch._dynamo.reset()
        model.compile(backend=backend)
        return model

    def _expected(self, first: int, last: int, begin: int = 0) -> list[tuple[int, str]]:
        return [(step, SPARSE if first <= step < last else DENSE) for step in range(begin, self.TOTAL)]

    def test_alone_it_makes_the_session_and_gives_the_position(self, tmp_path: Path) -> None:
        model = Recording()
        self._trainer(model, tmp_path).train()
        schedule = session_for(list(model.parameters())).schedule
        assert (schedule.step, schedule.total_steps, schedule.position_given) == (self.TOTAL - 1, self.TOTAL, True)

    @pytest.mark.parametrize("compile_first", [True, False])
    def test_fractions_work_compiled_before_or_after_the_trainer(self, tmp_path: Path, compile_first: bool) -> None:
        model = Recording()
        options = {"start_step": 0.25, "end_step": 0.75}
        if compile_first:
            self._compiled(model, **options)
        trainer = self._trainer(model, tmp_path)
        if not compile_first:
            self._compiled(model, **options)
        trainer.train()
        assert model.phases == self._expected(2, 6)

    def test_a_schedule_of_ones_own_gives_way_to_the_trainers(self, tmp_path: Path) -> None:
        schedule = Schedule(total_steps=1000)
        model = self._compiled(Recording(), start_step=0.25, schedule=schedule)
        self._trainer(model, tmp_path).train()
        assert schedule.total_steps == self.TOTAL
        assert model.phases == self._expected(2, self.TOTAL)

    def test_gradient_accumulation(self, tmp_path: Path) -> None:
        model = self._compiled(Recording(), start_step=0.5)
        self._trainer(model, tmp_path, gradient_accumulation_steps=2).train()
        assert model.phases == [entry for entry in self._expected(4, self.TOTAL) for _ in range(2)]

    def test_a_resumed_run_resumes_its_phase(self, tmp_path: Path) -> None:
        first = self._compiled(Recording(), start_step=0.5)
        self._trainer(first, tmp_path, save_strategy="steps", save_steps=5).train()
        resumed = self._compiled(Recording(), start_step=0.5)
        self._trainer(resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
        assert resumed.phases == self._expected(4, self.TOTAL, begin=5)

    def test_a_second_run_of_the_same_model_begins_anew(self, tmp_path: Path) -> None:
        model = self._compiled(Recording(), start_step=0.5)
        for _ in range(2):
            model.phases.clear()
            self._trainer(model, tmp_path).train()
            assert model.phases == self._expected(4, self.TOTAL)

    def test_a_model_that_trains_nothing_is_let_be(self) -> None:
        from transformers import TrainerControl, TrainerState, TrainingArguments

        from sparse_compile.ecosystem.callback import SparseLoRACallback

        callback, before = SparseLoRACallback(), owned()
        arguments = (TrainingArguments(use_cpu=True), TrainerState(max_steps=0), TrainerControl())
        callback.on_train_begin(*arguments, model=nn.Linear(1, 1).requires_grad_(False))
        callback.on_step_begin(*arguments)
        assert before == owned()
        # A run without any step has no length.
        callback.on_train_begin(*arguments, model=nn.Linear(1, 1))
