"""A sparse attention block computes what the masked-dense oracle does, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from graphs import (
    ANALYSES,
    aot_eager,
    assert_golden,
    capture,
    graph_eager,
    render,
    run_passes,
    run_rewritten,
    targets,
)
from models import BATCHES, DecoderConfig, Fp64Decoder, batch, gradients, masked_sites, variants
from sparse_compile.kernels.channel_selection import record_channels
from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.reference import masked_dense, output_mask_from_labels
from tolerances import assert_close_rms

PASS = "sparsify_attention"
SMALL = DecoderConfig(layers=1, hidden=8, ffn=12, heads=2, kv_heads=1, head_dim=4, vocab=11, adapters=("q_proj",))


def check(
    config: DecoderConfig,
    layer_sparsity: dict[str, float],
    inputs: dict[str, Tensor],
    compiler: Callable[..., Any] = graph_eager,
) -> Any:
    model = Fp64Decoder(config)
    with record_channels() as chosen:
        ran = run_rewritten(
            lambda **kwargs: model(**kwargs)[0],
            **inputs,
            config=SparseLoRAConfig(layer_sparsity=layer_sparsity),
            compiler=compiler,
        )
    assert ran.result.sparse is not None, ran.result.rejections
    ran.value.backward()
    actual = gradients(model)
    kept: dict[str, Any] = {name: found[0] for name, found in chosen.items() if ":" not in name}
    for name in {name.split(":")[0] for name in chosen if ":" in name}:
        kept[name] = (chosen[f"{name}:qk"][0], chosen[f"{name}:vo"][0])
    kept = {name.removeprefix("model."): channels for name, channels in kept.items()}
    with masked_dense(masked_sites(model, kept), output_mask_from_labels(inputs["labels"])):
        expected = model(**inputs)[0]
    expected.backward()
    assert_close_rms(ran.value, expected, name="loss")
    for name, gradient in gradients(model).items():
        assert_close_rms(actual[name], gradient, name=name)
    assert (model(**inputs)[0] - expected).abs() > 1e-6
    return ran


@pytest.mark.parametrize("name", variants())
def test_forward_and_gradients(name: str) -> None:
    config = replace(variants()[name], layers=2)
    ran = check(config, {"0.self_attn": 0.5, "1.self_attn": 0.75}, batch(config.vocab, padding="left"))
    assert next(record for record in ran.result.records if record.name == PASS).stats["sites"] == 2


@pytest.mark.parametrize("shape", BATCHES)
def test_batches(shape: str) -> None:
    config = replace(DecoderConfig(), layers=1)
    check(config, {"self_attn": 0.7}, batch(config.vocab, **BATCHES[shape]))


def test_both_blocks_of_a_layer() -> None:
    check(replace(DecoderConfig(), layers=2), {"1.self_attn": 0.5, "1.mlp": 0.75, "0.mlp": 0.5}, batch(61))


def test_one_channel() -> None:
    check(SMALL, {"self_attn": 0.99}, batch(11), aot_eager)


def test_one_head_and_bias() -> None:
    check(replace(SMALL, heads=1, kv_heads=1, bias=True), {"self_attn": 0.5}, batch(11), aot_eager)


def rewritten(sites: dict[str, float], dynamic: Callable[..., Any] = lambda *_: (), **fields: Any) -> Any:
    inputs = batch(11, rows=3, length=6)
    ids, labels = inputs["input_ids"], inputs["labels"]
    model = Fp64Decoder(replace(SMALL, **fields))
    config = SparseLoRAConfig(layer_sparsity=sites)
    captured = capture(model, ids, labels, config=config, dynamic=dynamic(ids, labels))
    return captured, run_passes(captured, *ANALYSES, "insert_predictors", PASS)[PASS]


def test_golden() -> None:
    captured, outcome = rewritten({"self_attn": 0.5})
    assert outcome.changed and outcome.stats["sites"] == 1
    assert_golden(PASS, render(captured))


def test_adapters_stay_dense_and_untouched() -> None:
    captured, _ = rewritten({"self_attn": 0.5}, adapters=("q_proj", "k_proj", "v_proj", "o_proj"))
    lines = [line for line in render(captured).splitlines() if ".lora_" in line and "= input" not in line]
    assert len(lines) == 8 and not any(PASS in line for line in lines)
    called = targets(captured.gm)
    assert called.count("gathered_linear") == 3 and called.count("gathered_input_linear") == 1


def test_nothing_planned() -> None:
    _, outcome = rewritten({"mlp": 0.5})
    assert not outcome.changed


def test_dynamic_first_dimension() -> None:
    _, outcome = rewritten({"self_attn": 0.5}, dynamic=lambda ids, labels: ((ids, 0), (labels, 0)))
    assert outcome.changed
