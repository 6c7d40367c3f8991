"""The phase that compiled graphs read, and when it may change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from noting_model import DENSE, NO_UNEXPECTED_WARNING, SPARSE, NotingModel, backward
from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.training.session import session_for

pytestmark = NO_UNEXPECTED_WARNING


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
        model = NotingModel()
        self._fuse(model)
        for _ in range(3):
            backward(model)
        assert model.session.schedule.step == 3

    def test_torchs_own_helper(self) -> None:
        from torch.distributed.optim import _apply_optimizer_in_backward

        model = NotingModel()
        _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.01})
        for _ in range(3):
            backward(model)
        assert model.session.schedule.step == 3

    def test_the_phase_holds_until_the_backward_is_over(self) -> None:
        model = NotingModel(start_step=1)
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
        class Checkpointed(NotingModel):
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
        model = NotingModel(start_step=1)
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


class TestDenseStep:
    """What a compiled graph reads the phase from."""

    CPU = torch.device("cpu")

    def test_it_follows_the_phase_in_place(self) -> None:
        model = NotingModel(start_step=1, end_step=2)
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
        model = NotingModel()
        session = model.session
        elsewhere = session.dense_step(torch.device("meta"))
        assert elsewhere.device.type == "meta"
        assert session.dense_step(self.CPU) is not elsewhere

    def test_a_graph_of_a_merged_session_goes_on_reading(self) -> None:
        model = NotingModel()
        sessions = [
            session_for([weight], SparseLoRAConfig(start_step=2))
            for weight in (model.first.weight, model.second.weight)
        ]
        flags = [session.dense_step(self.CPU) for session in sessions]
        assert flags[0] is not flags[1] and all(flags)
        session_for(list(model.parameters())).set_position(2, None)
        assert not any(flags)

    def test_it_is_made_and_moved_under_any_grad_mode(self) -> None:
        model = NotingModel(start_step=1)
        session = model.session
        with torch.inference_mode():
            flag = session.dense_step(self.CPU)
            session.set_position(1, None)
        assert not flag.is_inference() and not flag
        session.set_position(0, None)
        assert flag
