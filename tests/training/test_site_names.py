"""Site names that are expected, and those that a model has."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from noting_model import NO_UNEXPECTED_WARNING, NotingModel
from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.training.session import Session, session_for

pytestmark = NO_UNEXPECTED_WARNING


class TestSiteNames:
    NAMES = ("model.layers.0.mlp", "model.layers.1.mlp", "model.layers.11.mlp")

    def _session(self, model: nn.Module, *patterns: str, strict: bool = False) -> Session:
        sparsity = dict.fromkeys(patterns, 0.5)
        session = session_for(list(model.parameters()), SparseLoRAConfig(layer_sparsity=sparsity, strict=strict))
        session.expect_sites(sparsity)
        return session

    def test_names_that_match_are_silent(self) -> None:
        model = NotingModel()
        session = self._session(model, "1.mlp", "model.layers.11.mlp")
        session.add_site_names(self.NAMES)
        session.check_sites_now()
        session.note_training_forward("graph")
        session.note_training_forward("graph")

    def test_one_warning_lists_what_is_missing_and_what_is_there(self) -> None:
        model = NotingModel()
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
        model = NotingModel()
        session = self._session(model, "mlp")
        with pytest.warns(UserWarning, match="Sites there are: none"):
            session.check_sites_now()

    def test_later_graphs_of_the_first_step_are_waited_for(self) -> None:
        model = NotingModel()
        session = self._session(model, "0.mlp", "1.mlp")
        session.note_training_forward("one")
        session.add_site_names(self.NAMES[:1])
        session.note_training_forward("two")
        session.add_site_names(self.NAMES[1:])
        session.note_training_forward("one")

    def test_checked_at_the_second_forward_where_no_step_comes(self) -> None:
        model = NotingModel()
        session = self._session(model, "7.mlp")
        session.note_training_forward("one")
        session.note_training_forward("two")
        session.note_training_forward("two")
        with pytest.warns(UserWarning, match="7.mlp"):
            session.note_training_forward("one")

    def test_sessions_of_one_optimizer_are_one_model(self) -> None:
        model = NotingModel()
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
        model = NotingModel()
        first, second = self._session(model.first, "0.mlp", "1.mlp"), self._session(model.second, "0.mlp", "1.mlp")
        first.add_site_names(self.NAMES[:1])
        second.add_site_names(self.NAMES[1:])
        for _ in range(2):
            first.note_training_forward("one")
            second.note_training_forward("two")

    def test_a_late_session_does_not_repeat_the_warning(self) -> None:
        model = NotingModel()
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
        model = NotingModel()
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
