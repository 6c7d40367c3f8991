"""The support matrix, adapters: whatever form they have, a step is that of the masked-dense oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adapter_rows import ADAPTERS, SITES
from models import batch
from oracle import assert_differs, assert_same_step, oracle_step, sparse_step, told, train_step
from sweeps import sweep

THROUGH_AOT = ("all", "two_active", "modules_to_save")
"""Rows that go through AOTAutograd, which takes twice as long."""


@pytest.mark.parametrize("name", sweep(ADAPTERS, "all", "dora"))
def test_an_adapter_trains_as_the_oracle_says(name: str, request: pytest.FixtureRequest) -> None:
    compiler: Any = request.getfixturevalue("aot_eager_inductor" if name in THROUGH_AOT else "eager_inductor")
    model, inputs = ADAPTERS[name].build(), batch(97, padding="right")
    options = {"preset": "exact", "layer_sparsity": SITES, "strict": True}
    call = torch.compile(model, backend="sparselora", dynamic=False, options=options)
    with told() as messages:
        step, kept = sparse_step(model, call, inputs)
    assert messages == [] and compiler.sparse == [True]
    assert len(kept) == len(SITES)
    assert_same_step(step, oracle_step(model, kept, inputs), torch.float32)
    assert_differs(step, train_step(model, model, inputs), share=1e-3)
