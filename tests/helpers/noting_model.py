"""A model that tells its session what a compiled training graph would tell it."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.training import session as session_module
from sparse_compile.training.session import Session, session_for

DENSE, SPARSE = "dense", "sparse"

NO_UNEXPECTED_WARNING = pytest.mark.filterwarnings(
    "error:(?s).*(optimizer step was seen|length of the run|layer_sparsity)"
)
"""Makes an error of what users are told about a schedule or about site names, where a test does not ask for it."""

_SESSIONS: weakref.WeakKeyDictionary[nn.Module, Session] = weakref.WeakKeyDictionary()


class NotingModel(nn.Module):
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


def owned() -> dict[int, int]:
    """Return the ids of all living sessions, and how many parameters each has."""
    registry = session_module._REGISTRY
    return {session.id: registry.count(session) for session in registry.living()}
