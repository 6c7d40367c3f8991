"""Whose a parameter is, and the optimizer steps that are reported to its owner."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from noting_model import DENSE, NO_UNEXPECTED_WARNING, SPARSE, NotingModel, backward
from sparse_compile.torch_private.autograd import running_backward
from sparse_compile.training import session as session_module
from sparse_compile.training.registry import Registry
from sparse_compile.training.schedule import Schedule
from sparse_compile.training.session import Session

pytestmark = NO_UNEXPECTED_WARNING


class Owner:
    """Stands in for a session."""


class TestRegistry:
    @pytest.fixture
    def gone(self) -> list[Owner]:
        return []

    @pytest.fixture
    def stepped(self) -> list[list[Owner]]:
        return []

    @pytest.fixture
    def registry(self, gone: list[Owner], stepped: list[list[Owner]]) -> Registry[Owner]:
        return Registry(gone.append, stepped.append)

    def test_parameters_have_one_owner(self, registry: Registry[Owner]) -> None:
        one, two, three = (nn.Parameter(torch.zeros(1)) for _ in range(3))
        first, second = Owner(), Owner()
        registry.give(first, [one, two])
        registry.give(second, [two, three])
        assert registry.owners_of([three, two, one, nn.Parameter(torch.zeros(1))]) == [second, first]
        assert (registry.count(first), registry.count(second)) == (2, 1)
        assert registry.living() == [first, second]

    def test_the_last_death_is_reported_once(self, registry: Registry[Owner], gone: list[Owner]) -> None:
        one, two = (nn.Parameter(torch.zeros(1)) for _ in range(2))
        registry.give(owner := Owner(), [one, two])
        del one
        assert (registry.count(owner), gone) == (1, [])
        del two
        assert (registry.count(owner), gone, registry.living()) == (0, [owner], [])

    def test_what_is_handed_over_is_the_new_owners(self, registry: Registry[Owner], gone: list[Owner]) -> None:
        parameter, model = nn.Parameter(torch.zeros(1)), nn.Linear(1, 1)
        old, new = Owner(), Owner()
        registry.give(old, [parameter])
        registry.remember_model(model, old)
        registry.hand_over(old, new)
        assert registry.owners_of([parameter]) == registry.owners_of_model(model) == registry.living() == [new]
        assert registry.count(old) == 0
        del parameter
        assert gone == [new]

    def test_a_model_is_known_by_its_parts_and_by_what_is_around_it(self, registry: Registry[Owner]) -> None:
        part = nn.Sequential(nn.Linear(1, 1))
        whole = nn.Sequential(part)
        registry.remember_model(part, owner := Owner())
        assert [registry.owners_of_model(each) for each in (part, whole, part[0])] == [[owner]] * 3
        assert registry.owners_of_model(nn.Linear(1, 1)) == []
        del part, whole
        gc.collect()
        assert registry.living() == []

    def test_parameters_of_a_remembered_model_are_its_owners_at_a_step(
        self, registry: Registry[Owner], stepped: list[list[Owner]]
    ) -> None:
        """As the shards of FSDP2 are, which no graph sees."""
        model, gathered = nn.Linear(1, 1), nn.Parameter(torch.zeros(1))
        registry.give(owner := Owner(), [gathered])
        registry.remember_model(model, owner)
        registry.after_optimizer_step(torch.optim.SGD(model.parameters()), (), {})
        assert stepped == [[owner]]
        assert registry.count(owner) == 3

    def test_a_step_of_nobodys_parameters_and_one_that_was_skipped_are_not_reported(
        self, registry: Registry[Owner], stepped: list[list[Owner]]
    ) -> None:
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters())
        registry.after_optimizer_step(optimizer, (), {})
        registry.give(Owner(), model.parameters())
        optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
        registry.after_optimizer_step(optimizer, (), {})
        assert stepped == []


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
        model = NotingModel(start_step=2, end_step=4)
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

        hook = session_module._REGISTRY.after_optimizer_step
        sessions = [NotingModel().session for _ in range(3)]
        assert sessions
        assert list(_global_optimizer_post_hooks.values()).count(hook) == 1

    def test_gradient_accumulation(self) -> None:
        model = NotingModel()
        optimizer = torch.optim.SGD(model.parameters())
        for _ in range(3):
            for _ in range(4):
                backward(model)
            optimizer.step()
        assert model.session.schedule.step == 3

    def test_another_models_optimizer_does_not_count(self) -> None:
        model, other = NotingModel(), NotingModel()
        backward(model)
        torch.optim.SGD(other.parameters()).step()
        assert model.session.schedule.step == 0

    def test_forwards_without_gradients_do_not_count(self) -> None:
        model = NotingModel()
        optimizer = torch.optim.SGD(model.parameters())
        session = model.session
        with torch.no_grad():
            model(torch.ones(2, 3))
        optimizer.step()
        assert session.schedule.step == 0

    def test_subclass_that_calls_super(self) -> None:
        model = NotingModel()
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
        model = NotingModel()
        optimizers = [torch.optim.SGD([parameter]) for parameter in model.parameters()]
        for _ in range(3):
            backward(model)
            for optimizer in optimizers:
                optimizer.step()
        assert model.session.schedule.step == 3

    def test_lbfgs_runs_several_forwards_in_a_step(self) -> None:
        model = NotingModel()
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
        model = NotingModel()
        optimizer = _Sharpness(model.parameters())
        for _ in range(3):
            optimizer.step(lambda: backward(model))
        assert model.session.schedule.step == 3

    def test_learning_rate_scheduler_wraps_step(self) -> None:
        model = NotingModel()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        for _ in range(2):
            backward(model)
            optimizer.step()
            scheduler.step()
        assert model.session.schedule.step == 2

    def test_accelerates_wrapper(self) -> None:
        accelerate = pytest.importorskip("accelerate")
        model = NotingModel()
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
        model = NotingModel()
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
        model = NotingModel()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch._dynamo.reset()
        step = torch.compile(optimizer.step, backend="eager")
        for _ in range(3):
            backward(model)
            step()
        assert model.session.schedule.step == 3
        # Nothing of ours was compiled along with it.
        for function in (running_backward, Registry.owners_of, session_module._count_step, Session._refresh):
            assert not torch._dynamo.eval_frame._debug_get_cache_entry_list(function)

    def test_copied_model_and_pickled_optimizer(self) -> None:
        original = NotingModel()
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
        parts = [NotingModel(start_step=0, schedule=schedule) for _ in range(2)]
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
        models = [NotingModel(), NotingModel()]
        optimizer = torch.optim.SGD([p for model in models for p in model.parameters()])
        for model in models:
            backward(model)
        optimizer.step()
        assert [model.session.schedule.step for model in models] == [1, 1]
