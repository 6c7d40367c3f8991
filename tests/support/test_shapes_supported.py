"""The support matrix, shapes: sizes that are marked dynamic, and batches that are packed into one row."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adapter_rows import SITES, peft
from models import batch, fp64_decoder
from oracle import assert_same_step, oracle_step, sparse_step, told

OPTIONS = {"preset": "none", "layer_sparsity": SITES, "strict": True}


@pytest.mark.slow
def test_sizes_marked_dynamic_are_one_graph(aot_eager_inductor: Any) -> None:
    """Through AOTAutograd: a size that the backend made a constant of would raise there."""
    model = fp64_decoder(layers=1)
    call = torch.compile(model, backend="sparselora", options=OPTIONS)
    for rows, length in ((2, 9), (3, 12), (5, 7)):
        inputs = batch(61, rows=rows, length=length)
        for tensor in inputs.values():
            torch._dynamo.mark_dynamic(tensor, 0)
            torch._dynamo.mark_dynamic(tensor, 1)
        step, kept = sparse_step(model, call, inputs)
        assert len(kept) == len(SITES)
        assert_same_step(step, oracle_step(model, kept, inputs), torch.float64, what=f"{rows} x {length}")
    assert aot_eager_inductor.sparse == [True] and aot_eager_inductor.runs == [3]


@pytest.mark.parametrize("flash_arguments", [False, True], ids=["position_ids", "flash_arguments"])
def test_examples_flattened_into_one_row(flash_arguments: bool, eager_inductor: Any) -> None:
    """As `DataCollatorWithFlattening` makes them; the arguments for flash attention go unused with any other."""
    from transformers import DataCollatorWithFlattening

    examples = batch(97, rows=3, length=10)
    features = [{name: values[i, : 10 - 2 * i].tolist() for name, values in examples.items()} for i in range(3)]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=flash_arguments)
    inputs = dict(collate(features))
    assert inputs["input_ids"].shape == (1, 24) and ("cu_seq_lens_q" in inputs) == flash_arguments
    model = peft()()
    call = torch.compile(model, backend="sparselora", options=OPTIONS)
    with told() as messages:
        step, kept = sparse_step(model, call, inputs)
    assert messages == [] and eager_inductor.sparse == [True] and len(kept) == len(SITES)
    assert_same_step(step, oracle_step(model, kept, inputs), torch.float32)
