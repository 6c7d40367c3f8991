"""What the tests of factors share."""

from __future__ import annotations

import pytest
from torch import Tensor

from sparse_compile.predictor import store as store_module
from sparse_compile.predictor.svd import LowRankFactors, factorize


@pytest.fixture
def factorized(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The weights that were factorised, in order."""
    calls: list[Tensor] = []

    def counted(weight: Tensor, rank: int, seed: int) -> LowRankFactors:
        calls.append(weight)
        return factorize(weight, rank, seed)

    monkeypatch.setattr(store_module, "factorize", counted)
    return calls
