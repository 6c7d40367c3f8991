"""How often a training run compiles: at most twice, whatever the phases, lengths, splits and batch sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models import batch, fp64_decoder
from oracle import assert_same_step, oracle_step, sparse_step, train_step
from sparse_compile.kernels.channel_selection import record_channels

SITES = {"layers.0.mlp": 0.75, "layers.0.self_attn": 0.5}


@pytest.mark.slow
def test_ten_lengths_ten_splits_and_two_phases_compile_at_most_twice(aot_eager_inductor: Any) -> None:
    """Ten dense steps, ten sparse ones, ten dense ones again; each of another length and with other prompts."""
    model = fp64_decoder(layers=2)
    options = {"layer_sparsity": SITES, "strict": True, "start_step": 10, "end_step": 20}
    call = torch.compile(model, backend="sparselora", options=options)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(30):
        length = 8 + 3 * (step % 10)
        prompts = [(step + row) % (length - 1) + 1 for row in range(3)]
        with record_channels() as record:
            call(**batch(61, length=length, prompts=prompts, seed=step))[0].backward()
        assert bool(record) == (10 <= step < 20)
        optimizer.step()
        optimizer.zero_grad()
    assert 1 <= len(aot_eager_inductor.graphs) <= 2
    assert all(aot_eager_inductor.sparse)
    assert sum(aot_eager_inductor.runs) == 30, "every step ran compiled"


@pytest.mark.slow
def test_batch_sizes_and_extreme_splits_change_without_recompilation(aot_eager_inductor: Any) -> None:
    model = fp64_decoder(layers=2)
    call = torch.compile(model, backend="sparselora", options={"layer_sparsity": SITES, "strict": True})
    shapes: list[dict[str, Any]] = [
        {"rows": 2, "length": 9},
        {"rows": 3, "length": 12},
        {"rows": 4, "length": 12},
        {"rows": 5, "length": 7},
        {"rows": 2, "length": 12, "prompts": [0, 0]},
        {"rows": 3, "length": 5, "prompts": [5, 5, 4]},
        {"rows": 6, "length": 12, "prompts": [12, 0, 3, 1, 11, 12]},
    ]
    for shape in shapes:
        inputs = batch(61, **shape)
        step, kept = sparse_step(model, call, inputs)
        assert_same_step(step, oracle_step(model, kept, inputs), torch.float64, what=str(shape))
    assert len(aot_eager_inductor.graphs) <= 2
    assert sum(aot_eager_inductor.runs) == len(shapes)


def test_prompts_alone_never_recompile(aot_eager_inductor: Any) -> None:
    model = fp64_decoder(layers=2)
    call = torch.compile(model, backend="sparselora", options={"layer_sparsity": SITES, "strict": True})
    for prompt in range(8):
        train_step(model, call, batch(61, rows=2, length=7, prompts=[prompt, 7 - prompt] if prompt else [0, 6]))
    assert aot_eager_inductor.runs == [8]
