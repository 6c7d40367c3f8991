"""The session of a model: whose it is, what it remembers, and how sessions become one."""

from __future__ import annotations

import copy
import gc
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from noting_model import DENSE, NO_UNEXPECTED_WARNING, SPARSE, NotingModel, backward, owned
from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.training.session import session_for

pytestmark = NO_UNEXPECTED_WARNING


class TestWhoseParametersTheyAre:
    def test_parameters_of_one_model_lead_to_one_session(self) -> None:
        model = NotingModel()
        session = session_for(list(model.first.parameters()))
        assert session_for([model.first.bias, model.second.bias]) is session
        # The second parameter is the session's by now.
        assert session_for([model.second.bias]) is session

    def test_another_model_and_a_copy_are_others(self) -> None:
        model = NotingModel()
        session = model.session
        assert NotingModel().session is not session
        assert copy.deepcopy(model).session is not session
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        assert torch.load(buffer, weights_only=False).session is not session

    def test_equal_values_do_not_make_parameters_the_same(self) -> None:
        one, two = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
        assert session_for([one]) is not session_for([two])

    def test_no_parameter_no_session(self) -> None:
        with pytest.raises(ValueError, match="trained parameters"):
            session_for([])

    def test_a_dead_model_leaves_nothing_behind(self) -> None:
        gc.collect()
        before = owned()
        model = NotingModel(start_step=0)
        session = model.session
        optimizer = torch.optim.SGD(model.parameters())
        backward(model)
        optimizer.step()
        assert session.phase == SPARSE
        del model, optimizer
        gc.collect()
        assert owned() == before
        # The handle of a dead session is harmless, and does not come back to life.
        assert session.phase == DENSE
        session.set_position(9, 10)
        assert session.phase == DENSE

    def test_a_session_dies_with_its_last_parameter_only(self) -> None:
        one, two = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        session = session_for([one, two])
        del one
        gc.collect()
        assert session.phase == SPARSE
        assert session_for([two]) is session
        del two
        gc.collect()
        assert session.phase == DENSE

    def test_sessions_do_not_outlive_their_models_by_a_cycle(self) -> None:
        gc.collect()
        gc.disable()
        try:
            model = NotingModel(start_step=0)
            session = model.session
            assert session.phase == SPARSE
            del model
            assert session.phase == DENSE
        finally:
            gc.enable()

    def test_once(self) -> None:
        session, other = NotingModel().session, NotingModel().session
        assert session.once("key")
        # Both models are dead here, and a handle still answers.
        assert not session.once("key")
        assert session.once("another")
        assert other.once("key")

    def test_a_configuration_comes_late_and_may_be_replaced(self) -> None:
        model = NotingModel()
        parameters = list(model.parameters())
        session = session_for(parameters)
        assert session.config is None
        session_for(parameters, SparseLoRAConfig(start_step=3))
        assert session.phase == DENSE
        session_for(parameters, SparseLoRAConfig(start_step=0))
        assert session.phase == SPARSE
        session_for(parameters)
        assert session.config == SparseLoRAConfig(start_step=0)


class TestHolding:
    def test_steps_are_dense_until_every_hold_is_released(self) -> None:
        model = NotingModel(start_step=0)
        session = model.session
        assert session.phase == SPARSE
        session.hold_dense("one")
        session.hold_dense("two")
        assert session.phase == DENSE and session.due
        session.release("one")
        session.release("one")
        assert session.phase == DENSE
        session.release("two")
        assert session.phase == SPARSE

    def test_a_schedule_that_is_dense_stays_so(self) -> None:
        model = NotingModel(start_step=5)
        session = model.session
        session.hold_dense("one")
        session.release("one")
        assert session.phase == DENSE and not session.due

    def test_a_hold_outlives_a_merger(self) -> None:
        model = NotingModel(start_step=0)
        one, two = (session_for(list(part.parameters())) for part in (model.first, model.second))
        two.hold_dense("maps")
        merged = session_for(list(model.parameters()))
        assert {each.phase for each in (one, two, merged)} == {DENSE}
        merged.release("maps")
        assert {each.phase for each in (one, two, merged)} == {SPARSE}

    def test_another_configuration_holds_nothing(self) -> None:
        model = NotingModel(start_step=0)
        session = model.session
        session.hold_dense("maps")
        session_for(list(model.parameters()), session.config)
        assert session.phase == DENSE and session.holds("maps"), "another graph of the same options"
        session_for(list(model.parameters()), SparseLoRAConfig(preset="o2", start_step=0))
        assert session.phase == SPARSE and not session.holds("maps")

    def test_methods_are_not_called_within_a_backward_nor_where_no_step_was_taken(self) -> None:
        class Listener:
            def __init__(self) -> None:
                self.calls: list[int | None] = []

            def note(self) -> None:
                self.calls.append(session.schedule.step)

        model = NotingModel(start_step=0)
        session, listener = model.session, Listener()
        session.call_between_steps(listener.note)
        within: list[list[int | None]] = []
        optimizer = torch.optim.SGD(model.parameters())

        def step(_: torch.Tensor) -> None:
            optimizer.step()
            within.append(list(listener.calls))

        session_for(list(model.parameters()))
        assert not listener.calls
        model.second.weight.register_post_accumulate_grad_hook(step)
        backward(model)
        assert within == [[]] and listener.calls == [1]

    def test_methods_are_called_between_steps_while_their_objects_live(self) -> None:
        class Listener:
            def __init__(self) -> None:
                self.steps: list[int] = []

            def note(self) -> None:
                self.steps.append(session.schedule.step)

        model = NotingModel(start_step=0)
        session, listener = model.session, Listener()
        steps = listener.steps
        session.call_between_steps(listener.note)
        optimizer = torch.optim.SGD(model.parameters())
        for _ in range(2):
            backward(model)
            optimizer.step()
        assert steps == [1, 2]
        del listener
        gc.collect()
        backward(model)
        optimizer.step()
        assert steps == [1, 2]


class TestMerging:
    def test_bridged_sessions_become_one_and_both_handles_work(self) -> None:
        model = NotingModel()
        one = session_for([model.first.weight], SparseLoRAConfig(start_step=2))
        two = session_for([model.second.weight], SparseLoRAConfig(start_step=2))
        one.reports.append("one")
        two.reports.append("two")
        assert session_for(list(model.parameters())) is one
        assert one.id != two.id
        assert two.reports is one.reports
        assert one.reports == ["one", "two"]
        two.set_position(2, None)
        assert (one.phase, two.phase) == (SPARSE, SPARSE)
        assert one.once("said")
        assert not two.once("said")

    def test_both_handles_outlive_the_model(self) -> None:
        model = NotingModel()
        one, two = session_for([model.first.weight]), session_for([model.second.weight])
        session_for([model.first.weight, model.second.weight])
        assert (one.phase, two.phase) == (SPARSE, SPARSE)
        del model
        gc.collect()
        assert (one.phase, two.phase) == (DENSE, DENSE)

    def test_what_was_known_of_the_younger_goes_on(self) -> None:
        model = NotingModel()
        session_for([model.first.weight])
        younger = session_for([model.second.weight], SparseLoRAConfig(start_step=4))
        younger.set_position(4, 10)
        merged = session_for(list(model.parameters()))
        assert merged.config == SparseLoRAConfig(start_step=4)
        assert (merged.schedule.step, merged.phase) == (4, SPARSE)

    def test_merged_sessions_count_one_step(self) -> None:
        model = NotingModel()
        one, two = session_for([model.first.weight]), session_for([model.second.weight])
        session_for(list(model.parameters()))
        one.note_training_forward("a")
        two.note_training_forward("b")
        torch.optim.SGD(model.parameters()).step()
        assert one.schedule.step == two.schedule.step == 1

    def test_three_in_a_chain(self) -> None:
        parameters = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
        sessions = [session_for([parameter]) for parameter in parameters]
        session_for(parameters[1:])
        session_for(parameters[:2])
        sessions[2].set_position(5, 6)
        assert [session.schedule.step for session in sessions] == [5, 5, 5]
        assert {session.phase for session in sessions} == {SPARSE}


@pytest.mark.slow
def test_nothing_imports_transformers_and_the_exit_is_quiet(repo_root: Path) -> None:
    # A live model at exit: the callbacks of weak references run while modules are taken down.
    program = (
        "import sys, torch, sparse_compile.training.roles, sparse_compile.training.session as s\n"
        "model = torch.nn.Linear(1, 1); session = s.session_for(list(model.parameters()))\n"
        "sys.exit('transformers' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=repo_root, check=False)
    assert (done.returncode, done.stderr) == (0, "")
