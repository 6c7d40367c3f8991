"""How often a training run compiles: at most twice, whatever the phases, lengths, splits and batch sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import batch, fp64_decoder, tiny_llama, with_lora
from oracle import assert_same_step, oracle_step, sparse_step, told, train_step
from sparse_compile import token_roles
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


class Scaled(nn.Module):
    """A frozen layer with a trained factor."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.factor = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor, times: float = 1.0) -> Tensor:
        return (self.frozen(x) * self.factor * times).sum()


def told_at(call: Callable[..., Any], calls: list[dict[str, Any]]) -> list[list[str]]:
    """Return what is told at each of some calls."""
    found = []
    for inputs in calls:
        with told() as messages:
            call(**inputs)
        found.append(messages)
    return found


@pytest.mark.parametrize("limit", [2, 3])
def test_the_last_graph_that_dynamo_keeps_is_told_before_steps_run_eagerly(limit: int, eager_inductor: Any) -> None:
    """Whatever makes them: here a number that is another at each call."""
    with torch._dynamo.config.patch(recompile_limit=limit, specialize_float=True):
        call = torch.compile(Scaled(), backend="sparselora", options={"preset": "exact"}, dynamic=False)
        calls = [{"x": torch.ones(2, 4), "times": float(times)} for times in (1, 1, 2, 2, 3, 3, 4, 4, 5)]
        messages = told_at(call, calls)
    assert len(eager_inductor.graphs) == limit, "the others ran eagerly"
    assert [len(each) for each in messages] == [int(index == 2 * (limit - 1)) for index in range(len(calls))]
    (text,) = messages[2 * (limit - 1)]
    assert f"the last of {limit} graphs" in text and "recompile_limit" in text and "token_bucket" not in text


@pytest.mark.slow
def test_buckets_that_reach_the_limit_are_told_to_be_wider(eager_inductor: Any) -> None:
    options = {"layer_sparsity": {"layers.0.mlp": 0.5}, "token_bucket": 4}
    messages = []
    with torch._dynamo.config.patch(recompile_limit=2):
        call = torch.compile(fp64_decoder(layers=2), backend="sparselora", options=options)
        for prompt in (13, 8):
            inputs = batch(61, prompts=[prompt] * 3)
            with token_roles(labels=inputs["labels"]):
                messages += told_at(call, [inputs])
    assert len(eager_inductor.graphs) == 2
    assert not messages[0]
    assert len(messages[1]) == 1 and "a token_bucket larger than 4" in messages[1][0]


def test_an_evaluation_can_be_what_takes_the_last_place(eager_inductor: Any) -> None:
    with torch._dynamo.config.patch(recompile_limit=2):
        call = torch.compile(Scaled(), backend="sparselora", options={"preset": "exact"})
        (first,) = told_at(call, [{"x": torch.ones(2, 4)}])
        with torch.no_grad():
            (second,) = told_at(call, [{"x": torch.ones(2, 4)}])
    assert not first and len(second) == 1


@pytest.mark.slow
def test_one_graph_for_each_of_many_models_is_far_from_the_limit(eager_inductor: Any) -> None:
    """Graphs with sparse sites are guarded by their model, and Dynamo's limit counts those of one model."""
    models = [fp64_decoder(layers=2) for _ in range(3)]
    with torch._dynamo.config.patch(recompile_limit=2):
        for model in models:
            call = torch.compile(model, backend="sparselora", options={"layer_sparsity": {"layers.0.mlp": 0.5}})
            assert told_at(call, [batch(61)]) == [[]]
    assert len(eager_inductor.graphs) == 3


def test_padded_batches_of_other_sizes_return_logits_of_theirs(eager_inductor: Any) -> None:
    """While the graph for any size is compiled, sizes that stood apart at capture are found to be equal."""
    model = with_lora(tiny_llama(layers=2))
    call = torch.compile(model, backend="sparselora", options={"layer_sparsity": {"layers.0.mlp": 0.5}, "strict": True})
    for rows, length in ((4, 24), (3, 16), (2, 20)):
        inputs = batch(97, rows=rows, length=length, padding="left")
        outputs = call(**inputs)
        outputs.loss.backward()
        assert outputs.logits.shape == (rows, length, 97)
    assert len(eager_inductor.graphs) == 2
