"""Every sparse op gets the provider for its site's device and dtype; what was passed over is recorded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from graphs import ANALYSES, MLP, Captured, Head, capture, render, run_passes, tokens
from sparse_compile.graph.facts import Rejection
from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.passes.protocol import PassOutcome

SPARSE = ("insert_predictors", "sparsify_ffn", "sparsify_attention")
PASS = "lower_sparse_ops"


def lowered(*extra: str, **options: object) -> tuple[Captured, PassOutcome]:
    options = options or {"layer_sparsity": {"body.0": 0.5, "body.1": 0.5}}
    captured = capture(Head(MLP(), MLP()), *tokens(), config=SparseLoRAConfig(**options))  # type: ignore[arg-type]
    return captured, run_passes(captured, *ANALYSES, *SPARSE, PASS, *extra)[PASS]


def test_every_sparse_op_has_a_provider() -> None:
    captured, outcome = lowered()
    assert outcome.stats == {"cpu_index": 6, "cpu_gemm": 4} and not outcome.rejections
    assert captured.ctx.results.providers == dict.fromkeys(("body.0", "body.1"), ("cpu_index", "cpu_gemm"))
    for line in render(captured).splitlines():
        if any(f"{op}.default(" in line for op in ("take_rows", "put_rows", "linear")):
            assert "provider='cpu_" in line


def test_idempotent() -> None:
    captured, _ = lowered()
    before = render(captured)
    run_passes(captured, PASS)
    assert render(captured) == before


def test_nothing_to_lower() -> None:
    captured, outcome = lowered(preset="exact")
    assert not outcome.changed and captured.ctx.results.providers == {}


def test_another_device_is_declined_with_the_reason() -> None:
    captured = capture(Head(MLP()), *tokens(), config=SparseLoRAConfig(layer_sparsity={"body.0": 0.5}))
    run_passes(captured, *ANALYSES, *SPARSE)
    meta = {
        name: replace(parameter, value=parameter.value.to("meta"))
        for name, parameter in captured.ctx.env.parameters.items()
        if parameter.value is not None
    }
    captured.ctx.env = replace(captured.ctx.env, parameters=meta)
    outcome = run_passes(captured, PASS)[PASS]
    assert outcome.stats == {"reference": 5}
    assert Rejection(PASS, "gathered_linear", "cpu_gemm: runs on cpu, not on meta") in outcome.rejections
    assert len(outcome.rejections) == len(set(outcome.rejections)) == 4


def test_kernels_that_are_asked_for_and_do_not_run_here() -> None:
    _, outcome = lowered(layer_sparsity={"body.0": 0.5}, kernels="triton")
    assert outcome.stats == {"cpu_index": 3, "cpu_gemm": 2, "reference": 1}
    assert Rejection(PASS, "gathered_linear", "triton: runs on NVIDIA GPUs, not on cpu") in outcome.rejections
    assert {rejection.node for rejection in outcome.rejections} == {
        "gathered_linear", "gathered_input_linear", "top_channels", "take_rows", "put_rows",
    }  # fmt: skip


@pytest.mark.parametrize("dynamic", [0, 1])
def test_dynamic_sizes(dynamic: int) -> None:
    ids, labels = tokens(rows=3)
    captured = capture(
        Head(MLP()),
        ids,
        labels,
        config=SparseLoRAConfig(layer_sparsity={"body.0": 0.5}),
        dynamic=((ids, dynamic), (labels, dynamic)),
    )
    assert run_passes(captured, *ANALYSES, *SPARSE, PASS)[PASS].changed
    assert torch.is_tensor(captured.ctx.facts.factors["body.0.up"].b)
