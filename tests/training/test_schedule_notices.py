"""What users are told of a schedule that does not know the run, or does not move."""

from __future__ import annotations

import warnings

import pytest
import torch

from noting_model import DENSE, NO_UNEXPECTED_WARNING, SPARSE, NotingModel
from sparse_compile.training.schedule_notices import FORWARDS_BEFORE_WARNING

pytestmark = NO_UNEXPECTED_WARNING


class TestMissingSteps:
    def test_exactly_one_warning(self) -> None:
        session = (model := NotingModel()).session
        for _ in range(FORWARDS_BEFORE_WARNING - 1):
            session.note_training_forward("graph")
        with pytest.warns(UserWarning, match="no optimizer step was seen") as caught:
            session.note_training_forward("graph")
        # The fixture turns any further one into an error.
        for _ in range(3 * FORWARDS_BEFORE_WARNING):
            session.note_training_forward("graph")
        assert len(caught) == 1
        assert "SparseLoRACallback" in str(caught[0].message)
        assert model.session is session

    def test_several_graphs_of_a_model_are_one_forward(self) -> None:
        session = (model := NotingModel()).session
        for _ in range(FORWARDS_BEFORE_WARNING - 1):
            for graph in ("embedding", "block", "block", "head"):
                session.note_training_forward(graph)
        with pytest.warns(UserWarning, match="no optimizer step was seen"):
            session.note_training_forward("embedding")
        assert model.session is session

    def test_a_step_starts_the_count_anew(self) -> None:
        model = NotingModel()
        optimizer = torch.optim.SGD(model.parameters())
        for _ in range(2):
            for _ in range(FORWARDS_BEFORE_WARNING - 1):
                model.session.note_training_forward("graph")
            optimizer.step()
        assert model.session.schedule.step == 2

    def test_silent_where_the_position_is_given(self) -> None:
        model = NotingModel()
        model.session.set_position(0, 10)
        for _ in range(2 * FORWARDS_BEFORE_WARNING):
            model.session.note_training_forward("graph")


class TestUnknownTotal:
    def test_a_fraction_is_dense_with_one_warning(self) -> None:
        model = NotingModel(start_step=0.1, end_step=0.9)
        session = model.session
        with pytest.warns(UserWarning, match="length of the run is not known") as caught:
            session.note_training_forward("graph")
        session.note_training_forward("graph")
        assert len(caught) == 1
        assert "SparseLoRACallback" in str(caught[0].message)
        assert "Schedule(total_steps=...)" in str(caught[0].message)
        assert session.phase == DENSE

    def test_the_total_may_come_later(self) -> None:
        model = NotingModel(start_step=0.0)
        session = model.session
        assert session.phase == DENSE
        session.schedule.total_steps = 10
        assert session.phase == SPARSE
        session.note_training_forward("graph")

    @pytest.mark.usefixtures("default_start")
    def test_the_default_start_is_a_number_of_steps(self) -> None:
        session = (model := NotingModel()).session
        optimizer = torch.optim.SGD(model.parameters())
        phases = []
        for _ in range(22):
            phases.append(session.phase)
            session.note_training_forward("graph")
            optimizer.step()
        assert phases == [DENSE] * 20 + [SPARSE] * 2

    @pytest.mark.usefixtures("default_start")
    @pytest.mark.parametrize(("end", "warns"), [(20, True), (21, False)])
    def test_an_end_before_the_default_start_is_dense_with_one_warning(self, end: int, warns: bool) -> None:
        session = (model := NotingModel(end_step=end)).session
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                session.note_training_forward("graph")
        assert [f"end_step={end} does not lie behind step 20" in str(each.message) for each in caught] == [True] * warns
        assert model.session is session
