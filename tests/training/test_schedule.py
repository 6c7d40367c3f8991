"""The schedule, the session of a model, step counting and the trainer's callback."""

from __future__ import annotations

import copy
import gc
import io
import logging
import pickle
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.training import session as session_module
from sparse_compile.training.schedule import Schedule, phase_at, sparse_window
from sparse_compile.training.session import FORWARDS_BEFORE_WARNING, Session, session_for

DENSE, SPARSE = "dense", "sparse"

_SESSIONS: weakref.WeakKeyDictionary[nn.Module, Session] = weakref.WeakKeyDictionary()


class Model(nn.Module):
    """A model whose forward does what a compiled training graph does: it notes that it runs."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 1)
        self.options = options

    @property
    def session(self) -> Session:
        # Looked up once for each model, as a compiled graph does; a copy of the model is another model.
        if self not in _SESSIONS:
            config = SparseLoRAConfig(**self.options) if self.options else None
            _SESSIONS[self] = session_for(list(self.parameters()), config)
        return _SESSIONS[self]

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.session.note_training_forward("graph")
        return self.second(self.first(x)).square().mean()


def backward(model: nn.Module) -> None:
    model(torch.ones(2, 3)).backward()


@pytest.fixture(autouse=True)
def _unexpected_warnings_fail() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(?s).*(optimizer step was seen|length of the run|layer_sparsity)")
        yield


# --- Window and phase -------------------------------------------------------------------------------------------------


class TestPhaseAt:
    @pytest.mark.parametrize(
        ("total", "start", "end", "window"),
        [
            (100, None, None, (5, None)),
            (None, None, None, (0, None)),
            (None, None, 7, (0, 7)),
            (None, 3, None, (3, None)),
            (None, 0, 10, (0, 10)),
            (100, 0.1, 0.9, (10, 90)),
            # An integer is steps, a float a fraction, at 0 and 1 too.
            (100, 1, None, (1, None)),
            (100, 1.0, None, (100, None)),
            (100, 0.0, 1.0, (0, 100)),
            (100, 0, 1, (0, 1)),
            # Start rounds up, end rounds down.
            (7, 0.5, 0.5, (4, 3)),
            (19, None, None, (1, None)),
            (21, None, None, (2, None)),
            # Decimal arithmetic: in binary 0.07 * 100 > 7 and 0.29 * 100 < 29.
            (100, 0.07, 0.29, (7, 29)),
            # A fraction without a total.
            (None, 0.1, None, None),
            (None, 5, 0.9, None),
            (None, None, 0.9, None),
        ],
    )
    def test_window(
        self, total: int | None, start: float | None, end: float | None, window: tuple[int, int | None] | None
    ) -> None:
        assert sparse_window(total, start, end) == window

    def test_the_window_is_half_open(self) -> None:
        assert [phase_at(step, None, 2, 4) for step in range(6)] == [DENSE, DENSE, SPARSE, SPARSE, DENSE, DENSE]

    def test_unknown_and_empty_windows_are_dense(self) -> None:
        assert phase_at(50, None, 0.1, None) == DENSE
        assert {phase_at(step, 7, 0.5, 0.5) for step in range(8)} == {DENSE}

    def test_a_whole_run(self) -> None:
        phases = [phase_at(step, 20, None, None) for step in range(20)]
        assert phases == [DENSE] + [SPARSE] * 19


class TestSchedule:
    def test_defaults(self) -> None:
        schedule = Schedule()
        assert (schedule.step, schedule.total_steps, schedule.position_given) == (0, None, False)
        assert "step=0" in repr(schedule)

    @pytest.mark.parametrize("total", [0, -1, 1.5, True, "10"])
    def test_total_is_a_positive_integer(self, total: Any) -> None:
        with pytest.raises(ValueError, match="total_steps must be a positive integer"):
            Schedule(total)
        schedule = Schedule(5)
        with pytest.raises(ValueError, match="total_steps"):
            schedule.total_steps = total
        assert schedule.total_steps == 5

    @pytest.mark.parametrize("step", [-1, 0.5, True, None])
    def test_step_is_an_integer_from_zero(self, step: Any) -> None:
        schedule = Schedule()
        with pytest.raises(ValueError, match="step must be an integer >= 0"):
            schedule.step = step
        assert schedule.step == 0

    def test_a_step_counts_once_between_two_forwards(self) -> None:
        schedule = Schedule()
        assert not schedule.note_step()
        schedule.note_forward()
        schedule.note_forward()
        assert schedule.note_step()
        assert not schedule.note_step()
        schedule.note_forward()
        assert schedule.note_step()
        assert schedule.step == 2
        assert not schedule.position_given

    def test_listeners_see_step_and_total_change_together_and_only_changes(self) -> None:
        class Listener:
            def __init__(self) -> None:
                self.seen: list[tuple[int, int | None]] = []

            def changed(self) -> None:
                self.seen.append((schedule.step, schedule.total_steps))

        schedule, listener = Schedule(), Listener()
        schedule.subscribe(listener.changed)
        schedule.set_position(3, 10)
        schedule.set_position(3, 10)
        schedule.total_steps = 10
        schedule.total_steps = 20
        assert listener.seen == [(3, 10), (3, 20)]
        schedule.unsubscribe(listener.changed)
        schedule.step = 9
        assert len(listener.seen) == 2

    def test_a_copy_stands_where_the_original_stood_and_steers_nothing(self) -> None:
        model = Model(start_step=5, schedule=Schedule(10))
        session = model.session
        for clone in (copy.deepcopy(session.schedule), pickle.loads(pickle.dumps(session.schedule))):
            assert clone.total_steps == 10
            clone.step = 7
            assert session.phase == DENSE
        session.schedule.step = 7
        assert session.phase == SPARSE


# --- Sessions ---------------------------------------------------------------------------------------------------------


class TestRegistry:
    def test_parameters_of_one_model_lead_to_one_session(self) -> None:
        model = Model()
        session = session_for(list(model.first.parameters()))
        assert session_for([model.first.bias, model.second.bias]) is session
        # The second parameter is the session's by now.
        assert session_for([model.second.bias]) is session

    def test_another_model_and_a_copy_are_others(self) -> None:
        model = Model()
        session = model.session
        assert Model().session is not session
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
        owners = set(session_module._OWNERS)
        model = Model(start_step=0)
        session = model.session
        optimizer = torch.optim.SGD(model.parameters())
        backward(model)
        optimizer.step()
        assert session.phase == SPARSE
        del model, optimizer
        gc.collect()
        assert set(session_module._OWNERS) == owners
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
            model = Model(start_step=0)
            session = model.session
            assert session.phase == SPARSE
            del model
            assert session.phase == DENSE
        finally:
            gc.enable()

    def test_once(self) -> None:
        session, other = Model().session, Model().session
        assert session.once("key")
        # Both models are dead here, and a handle still answers.
        assert not session.once("key")
        assert session.once("another")
        assert other.once("key")

    def test_a_configuration_comes_late_and_may_be_replaced(self) -> None:
        model = Model()
        parameters = list(model.parameters())
        session = session_for(parameters)
        assert session.config is None
        session_for(parameters, SparseLoRAConfig(start_step=3))
        assert session.phase == DENSE
        session_for(parameters, SparseLoRAConfig(start_step=0))
        assert session.phase == SPARSE
        session_for(parameters)
        assert session.config == SparseLoRAConfig(start_step=0)


class TestMerging:
    def test_bridged_sessions_become_one_and_both_handles_work(self) -> None:
        model = Model()
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
        model = Model()
        one, two = session_for([model.first.weight]), session_for([model.second.weight])
        session_for([model.first.weight, model.second.weight])
        assert (one.phase, two.phase) == (SPARSE, SPARSE)
        del model
        gc.collect()
        assert (one.phase, two.phase) == (DENSE, DENSE)

    def test_what_was_known_of_the_younger_goes_on(self) -> None:
        model = Model()
        session_for([model.first.weight])
        younger = session_for([model.second.weight], SparseLoRAConfig(start_step=4))
        younger.set_position(4, 10)
        merged = session_for(list(model.parameters()))
        assert merged.config == SparseLoRAConfig(start_step=4)
        assert (merged.schedule.step, merged.phase) == (4, SPARSE)

    def test_merged_sessions_count_one_step(self) -> None:
        model = Model()
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


# --- Counting ---------------------------------------------------------------------------------------------------------


class _Inherited(torch.optim.SGD):
    """Overrides step and calls the parent's, which torch may have hooked as well."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class _Sharpness(torch.optim.Optimizer):
    """Two forwards and a step of another optimizer inside one step, as sharpness-aware minimisation does."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})
        self.base = torch.optim.SGD(self.param_groups, lr=0.1)

    def step(self, closure: Callable[[], None]) -> None:  # type: ignore[override]
        closure()
        closure()
        self.base.step()


class TestCounting:
    def test_nobody_helps(self) -> None:
        model = Model(start_step=2, end_step=4)
        optimizer = torch.optim.AdamW(model.parameters())
        phases = []
        for _ in range(6):
            phases.append(model.session.phase)
            backward(model)
            optimizer.step()
        assert phases == [DENSE, DENSE, SPARSE, SPARSE, DENSE, DENSE]
        assert model.session.schedule.step == 6

    def test_the_hook_is_registered_once(self) -> None:
        from torch.optim.optimizer import _global_optimizer_post_hooks

        sessions = [Model().session for _ in range(3)]
        assert sessions
        assert list(_global_optimizer_post_hooks.values()).count(session_module._after_optimizer_step) == 1

    def test_gradient_accumulation(self) -> None:
        model = Model()
        optimizer = torch.optim.SGD(model.parameters())
        for _ in range(3):
            for _ in range(4):
                backward(model)
            optimizer.step()
        assert model.session.schedule.step == 3

    def test_another_models_optimizer_does_not_count(self) -> None:
        model, other = Model(), Model()
        backward(model)
        torch.optim.SGD(other.parameters()).step()
        assert model.session.schedule.step == 0

    def test_forwards_without_gradients_do_not_count(self) -> None:
        model = Model()
        optimizer = torch.optim.SGD(model.parameters())
        session = model.session
        with torch.no_grad():
            model(torch.ones(2, 3))
        optimizer.step()
        assert session.schedule.step == 0

    def test_subclass_that_calls_super(self) -> None:
        model = Model()
        # An instance of the parent makes torch hook the parent's step as well.
        torch.optim.SGD(model.parameters())
        optimizer = _Inherited(model.parameters(), lr=0.1)
        fired = []
        handle = optimizer.register_step_post_hook(lambda *args: fired.append(args))
        for _ in range(3):
            backward(model)
            optimizer.step()
        handle.remove()
        assert len(fired) == 6, "torch fires the hook twice for such a step; else this test shows nothing"
        assert model.session.schedule.step == 3

    def test_optimizer_per_parameter(self) -> None:
        model = Model()
        optimizers = [torch.optim.SGD([parameter]) for parameter in model.parameters()]
        for _ in range(3):
            backward(model)
            for optimizer in optimizers:
                optimizer.step()
        assert model.session.schedule.step == 3

    def test_lbfgs_runs_several_forwards_in_a_step(self) -> None:
        model = Model()
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)
        forwards = 0

        def closure() -> Tensor:
            nonlocal forwards
            forwards += 1
            optimizer.zero_grad()
            loss: Tensor = model(torch.ones(2, 3))
            loss.backward()
            return loss

        for _ in range(2):
            optimizer.step(closure)
        assert forwards > 2
        assert model.session.schedule.step == 2

    def test_an_optimizer_inside_an_optimizer(self) -> None:
        model = Model()
        optimizer = _Sharpness(model.parameters())
        for _ in range(3):
            optimizer.step(lambda: backward(model))
        assert model.session.schedule.step == 3

    def test_learning_rate_scheduler_wraps_step(self) -> None:
        model = Model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        for _ in range(2):
            backward(model)
            optimizer.step()
            scheduler.step()
        assert model.session.schedule.step == 2

    def test_accelerates_wrapper(self) -> None:
        accelerate = pytest.importorskip("accelerate")
        model = Model()
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        wrapped, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
        for _ in range(4):
            with accelerator.accumulate(wrapped):
                accelerator.backward(wrapped(torch.ones(2, 3)))
                optimizer.step()
                optimizer.zero_grad()
        assert model.session.schedule.step == 2

    @pytest.mark.parametrize("fused", [False, True])
    def test_steps_that_the_gradient_scaler_skips(self, fused: bool) -> None:
        model = Model()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1, fused=fused)
        # A fused optimizer is called even for a skipped step, and leaves the parameters alone by itself.
        assert getattr(optimizer, "_step_supports_amp_scaling", False) is fused
        scaler = torch.amp.GradScaler("cpu")
        counted = []
        for overflow in (False, True, True, False):
            before = model.first.weight.detach().clone()
            scaler.scale(model(torch.ones(2, 3))).backward()
            if overflow:
                assert model.first.weight.grad is not None
                model.first.weight.grad.fill_(float("inf"))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            assert torch.equal(before, model.first.weight) is overflow
            counted.append(model.session.schedule.step)
        assert counted == [1, 1, 1, 2]

    def test_compiled_optimizer_step(self) -> None:
        model = Model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch._dynamo.reset()
        step = torch.compile(optimizer.step, backend="eager")
        for _ in range(3):
            backward(model)
            step()
        assert model.session.schedule.step == 3
        # Nothing of ours was compiled along with it.
        for function in (session_module.running_backward, session_module._owner, Session._refresh):
            assert not torch._dynamo.eval_frame._debug_get_cache_entry_list(function)

    def test_copied_model_and_pickled_optimizer(self) -> None:
        original = Model()
        backward(original)
        model, optimizer = pickle.loads(pickle.dumps((original, torch.optim.SGD(original.parameters(), lr=0.1))))
        backward(model)
        optimizer.step()
        assert model.session.schedule.step == 1
        assert original.session.schedule.step == 0
        clone = copy.deepcopy(model)
        clone_optimizer = torch.optim.SGD(clone.parameters(), lr=0.1)
        backward(clone)
        clone_optimizer.step()
        assert (clone.session.schedule.step, model.session.schedule.step) == (1, 1)

    def test_sessions_that_share_a_schedule_count_a_step_once(self) -> None:
        schedule = Schedule()
        parts = [Model(start_step=0, schedule=schedule) for _ in range(2)]
        together = torch.optim.SGD([p for part in parts for p in part.parameters()])
        apart = [torch.optim.SGD(part.parameters()) for part in parts]
        for part in parts:
            backward(part)
        together.step()
        assert schedule.step == 1
        for part in parts:
            backward(part)
        for optimizer in apart:
            optimizer.step()
        assert schedule.step == 2

    def test_one_optimizer_of_two_models_counts_for_both(self) -> None:
        models = [Model(), Model()]
        optimizer = torch.optim.SGD([p for model in models for p in model.parameters()])
        for model in models:
            backward(model)
        optimizer.step()
        assert [model.session.schedule.step for model in models] == [1, 1]


class TestStepsInsideTheBackward:
    """Optimizers fused into the backward: the step is counted at once, the phase changes when the backward is over."""

    @staticmethod
    def _fuse(model: nn.Module) -> None:
        for parameter in model.parameters():
            optimizer = torch.optim.SGD([parameter], lr=0.01)

            def step(parameter: Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
                optimizer.step()
                optimizer.zero_grad()

            parameter.register_post_accumulate_grad_hook(step)

    def test_counted_once_per_backward(self) -> None:
        model = Model()
        self._fuse(model)
        for _ in range(3):
            backward(model)
        assert model.session.schedule.step == 3

    def test_torchs_own_helper(self) -> None:
        from torch.distributed.optim import _apply_optimizer_in_backward

        model = Model()
        _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.01})
        for _ in range(3):
            backward(model)
        assert model.session.schedule.step == 3

    def test_the_phase_holds_until_the_backward_is_over(self) -> None:
        model = Model(start_step=1)
        self._fuse(model)
        seen: list[tuple[int, str]] = []
        model.first.weight.register_hook(lambda _: seen.append((model.session.schedule.step, model.session.phase)))
        for expected in (DENSE, SPARSE):
            seen.clear()
            assert model.session.phase == expected
            backward(model)
            # The optimizer of the last layer has stepped by the time the first layer gets its gradient.
            assert seen == [(model.session.schedule.step, expected)]
        assert model.session.schedule.step == 2

    def test_a_recomputation_sees_the_phase_of_its_forward_and_is_no_forward(self) -> None:
        class Checkpointed(Model):
            def forward(self, x: Tensor) -> Tensor:
                out: Tensor = checkpoint(self._first, x, use_reentrant=False)
                return self.second(out).square().mean()

            def _first(self, x: Tensor) -> Tensor:
                phases.append(self.session.phase)
                self.session.note_training_forward("first")
                return self.first(x)

        phases: list[str] = []
        model = Checkpointed(start_step=1)
        self._fuse(model)
        for _ in range(3):
            backward(model)
        assert phases == [DENSE, DENSE, SPARSE, SPARSE, SPARSE, SPARSE]
        assert model.session.schedule.step == 3

    def test_a_backward_that_fails_does_not_freeze_the_phase(self) -> None:
        model = Model(start_step=1)
        self._fuse(model)
        failing = True

        def hook(grad: Tensor) -> None:
            if failing:
                raise RuntimeError("broken")

        model.first.weight.register_hook(hook)
        with pytest.raises(RuntimeError, match="broken"):
            backward(model)
        failing = False
        backward(model)
        assert model.session.phase == SPARSE


# --- What the user is told --------------------------------------------------------------------------------------------


class TestMissingSteps:
    def test_exactly_one_warning(self) -> None:
        session = (model := Model()).session
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
        session = (model := Model()).session
        for _ in range(FORWARDS_BEFORE_WARNING - 1):
            for graph in ("embedding", "block", "block", "head"):
                session.note_training_forward(graph)
        with pytest.warns(UserWarning, match="no optimizer step was seen"):
            session.note_training_forward("embedding")
        assert model.session is session

    def test_a_step_starts_the_count_anew(self) -> None:
        model = Model()
        optimizer = torch.optim.SGD(model.parameters())
        for _ in range(2):
            for _ in range(FORWARDS_BEFORE_WARNING - 1):
                model.session.note_training_forward("graph")
            optimizer.step()
        assert model.session.schedule.step == 2

    def test_silent_where_the_position_is_given(self) -> None:
        model = Model()
        model.session.set_position(0, 10)
        for _ in range(2 * FORWARDS_BEFORE_WARNING):
            model.session.note_training_forward("graph")


class TestUnknownTotal:
    def test_a_fraction_is_dense_with_one_warning(self) -> None:
        model = Model(start_step=0.1, end_step=0.9)
        session = model.session
        with pytest.warns(UserWarning, match="length of the run is not known") as caught:
            session.note_training_forward("graph")
        session.note_training_forward("graph")
        assert len(caught) == 1
        assert "SparseLoRACallback" in str(caught[0].message)
        assert "Schedule(total_steps=...)" in str(caught[0].message)
        assert session.phase == DENSE

    def test_the_total_may_come_later(self) -> None:
        model = Model(start_step=0.0)
        session = model.session
        assert session.phase == DENSE
        session.schedule.total_steps = 10
        assert session.phase == SPARSE
        session.note_training_forward("graph")

    def test_the_default_start_is_told_once(self, caplog: pytest.LogCaptureFixture) -> None:
        model = Model()
        session = model.session
        with caplog.at_level(logging.INFO, "sparse_compile"):
            for _ in range(3):
                session.note_training_forward("graph")
        assert [record.levelname for record in caplog.records] == ["INFO"]
        assert session.phase == SPARSE

    def test_nothing_is_said_where_the_total_is_known(self, caplog: pytest.LogCaptureFixture) -> None:
        model = Model(start_step=0.5, schedule=Schedule(10))
        with caplog.at_level(logging.INFO, "sparse_compile"):
            model.session.note_training_forward("graph")
        assert not caplog.records


class TestSiteNames:
    NAMES = ("model.layers.0.mlp", "model.layers.1.mlp", "model.layers.11.mlp")

    def _session(self, model: nn.Module, *patterns: str, strict: bool = False) -> Session:
        sparsity = dict.fromkeys(patterns, 0.5)
        session = session_for(list(model.parameters()), SparseLoRAConfig(layer_sparsity=sparsity, strict=strict))
        session.expect_sites(sparsity)
        return session

    def test_names_that_match_are_silent(self) -> None:
        model = Model()
        session = self._session(model, "1.mlp", "model.layers.11.mlp")
        session.add_site_names(self.NAMES)
        session.check_sites_now()
        session.note_training_forward("graph")
        session.note_training_forward("graph")

    def test_one_warning_lists_what_is_missing_and_what_is_there(self) -> None:
        model = Model()
        optimizer = torch.optim.SGD(model.parameters())
        session = self._session(model, "1.mlp", "7.mlp", "layers.8.mlp")
        session.add_site_names(self.NAMES)
        session.note_training_forward("graph")
        with pytest.warns(UserWarning, match="matches 7.mlp, layers.8.mlp. Sites there are: " + ", ".join(self.NAMES)):
            optimizer.step()
        session.note_training_forward("graph")
        session.note_training_forward("graph")
        optimizer.step()

    def test_no_site_at_all(self) -> None:
        model = Model()
        session = self._session(model, "mlp")
        with pytest.warns(UserWarning, match="Sites there are: none"):
            session.check_sites_now()

    def test_later_graphs_of_the_first_step_are_waited_for(self) -> None:
        model = Model()
        session = self._session(model, "0.mlp", "1.mlp")
        session.note_training_forward("one")
        session.add_site_names(self.NAMES[:1])
        session.note_training_forward("two")
        session.add_site_names(self.NAMES[1:])
        session.note_training_forward("one")

    def test_checked_at_the_second_forward_where_no_step_comes(self) -> None:
        model = Model()
        session = self._session(model, "7.mlp")
        session.note_training_forward("one")
        session.note_training_forward("two")
        session.note_training_forward("two")
        with pytest.warns(UserWarning, match="7.mlp"):
            session.note_training_forward("one")

    def test_sessions_of_one_optimizer_are_one_model(self) -> None:
        model = Model()
        optimizer = torch.optim.SGD(model.parameters())
        sessions = []
        for graph, part, names in (("one", model.first, self.NAMES[:1]), ("two", model.second, self.NAMES[1:])):
            session = self._session(part, "0.mlp", "1.mlp", "7.mlp")
            session.add_site_names(names)
            session.note_training_forward(graph)
            sessions.append(session)
        with pytest.warns(UserWarning, match=r"matches 7\.mlp\. ") as caught:
            optimizer.step()
        assert len(caught) == 1
        assert sessions[0] is not sessions[1]

    def test_sessions_with_the_same_expectations_are_one_model_before_any_step(self) -> None:
        model = Model()
        first, second = self._session(model.first, "0.mlp", "1.mlp"), self._session(model.second, "0.mlp", "1.mlp")
        first.add_site_names(self.NAMES[:1])
        second.add_site_names(self.NAMES[1:])
        for _ in range(2):
            first.note_training_forward("one")
            second.note_training_forward("two")

    def test_a_late_session_does_not_repeat_the_warning(self) -> None:
        model = Model()
        optimizer = torch.optim.SGD(model.parameters())
        first = self._session(model.first, "7.mlp")
        first.note_training_forward("one")
        with pytest.warns(UserWarning, match="7.mlp"):
            optimizer.step()
        second = self._session(model.second, "7.mlp")
        second.note_training_forward("two")
        optimizer.step()
        assert second.schedule.step == 1

    @pytest.mark.parametrize("when", ["now", "step", "forward"])
    def test_strict_raises(self, when: str) -> None:
        model = Model()
        optimizer = torch.optim.SGD(model.parameters())
        session = self._session(model, "7.mlp", strict=True)
        session.add_site_names(self.NAMES)
        session.note_training_forward("graph")
        check: dict[str, Callable[[], object]] = {
            "now": session.check_sites_now,
            "step": optimizer.step,
            "forward": lambda: session.note_training_forward("graph"),
        }
        with pytest.raises(ValueError, match=r"7\.mlp.*model\.layers\.11\.mlp"):
            check[when]()


# --- What graphs read -------------------------------------------------------------------------------------------------


class TestDenseStep:
    """What a compiled graph reads the phase from."""

    CPU = torch.device("cpu")

    def test_it_follows_the_phase_in_place(self) -> None:
        model = Model(start_step=1, end_step=2)
        session = model.session
        flag = session.dense_step(self.CPU)
        assert (flag.dtype, flag.shape) == (torch.bool, ())
        found = []
        for step in (0, 1, 2):
            session.set_position(step, None)
            assert session.dense_step(self.CPU) is flag
            found.append((bool(flag), session.phase))
        assert found == [(True, DENSE), (False, SPARSE), (True, DENSE)]

    def test_each_device_has_its_own(self) -> None:
        model = Model()
        session = model.session
        elsewhere = session.dense_step(torch.device("meta"))
        assert elsewhere.device.type == "meta"
        assert session.dense_step(self.CPU) is not elsewhere

    def test_a_graph_of_a_merged_session_goes_on_reading(self) -> None:
        model = Model()
        sessions = [
            session_for([weight], SparseLoRAConfig(start_step=2))
            for weight in (model.first.weight, model.second.weight)
        ]
        flags = [session.dense_step(self.CPU) for session in sessions]
        assert flags[0] is not flags[1] and all(flags)
        session_for(list(model.parameters())).set_position(2, None)
        assert not any(flags)

    def test_it_is_made_and_moved_under_any_grad_mode(self) -> None:
        model = Model(start_step=1)
        session = model.session
        with torch.inference_mode():
            flag = session.dense_step(self.CPU)
            session.set_position(1, None)
        assert not flag.is_inference() and not flag
        session.set_position(0, None)
        assert flag


def test_nothing_imports_transformers_and_the_exit_is_quiet() -> None:
    # A live model at exit: the callbacks of weak references run while modules are taken down.
    program = (
        "import sys, torch, sparse_compile.training.roles, sparse_compile.training.session as s\n"
        "model = torch.nn.Linear(1, 1); session = s.session_for(list(model.parameters()))\n"
        "sys.exit('transformers' in sys.modules)\n"
    )
    root = Path(session_module.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# --- The trainer's callback -------------------------------------------------------------------------------------------


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

        callback, before = SparseLoRACallback(), set(session_module._OWNERS)
        arguments = (TrainingArguments(use_cpu=True), TrainerState(max_steps=0), TrainerControl())
        callback.on_train_begin(*arguments, model=nn.Linear(1, 1).requires_grad_(False))
        callback.on_step_begin(*arguments)
        assert before == set(session_module._OWNERS)
        # A run without any step has no length.
        callback.on_train_begin(*arguments, model=nn.Linear(1, 1))


class Recording(nn.Module):
    """A model that a trainer can train; its compiled forward notes (step, phase) in `phases`."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.phases: list[tuple[int, str]] = []

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.linear(x).square().mean()}
