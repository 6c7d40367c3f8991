"""The support matrix, adapters: whatever form they have, a step is that of the masked-dense oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models import batch
from oracle import assert_differs, assert_same_step, oracle_step, sparse_step, told, train_step
from support.adapters import ADAPTERS, SITES
from support.rows import NotSupportedError, cases


@pytest.mark.parametrize("name", cases(ADAPTERS))
def test_an_adapter_trains_as_the_oracle_says(name: str, aot_eager_inductor: Any) -> None:
    row = ADAPTERS[name]
    model, inputs = row.build(), batch(97, padding="right")
    options = {"preset": "exact", "layer_sparsity": SITES, "strict": not row.declined}
    call = torch.compile(model, backend="sparselora", dynamic=False, options=options)
    with told() as messages:
        step, kept = sparse_step(model, call, inputs)
        if row.declined:
            train_step(model, call, inputs)
    if row.declined:
        assert len(messages) == 1 and row.declined in messages[0], messages
        assert_same_step(step, train_step(model, model, inputs), torch.float32)
        raise NotSupportedError(row.declined)
    assert messages == [] and aot_eager_inductor.sparse == [True]
    assert len(kept) == len(SITES)
    assert_same_step(step, oracle_step(row.for_oracle(model), kept, inputs), torch.float32)
    assert_differs(step, train_step(model, model, inputs), share=1e-3)
