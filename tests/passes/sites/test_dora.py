"""DoRA under sparsity: PEFT's layers, rewritten, compute what the masked-dense oracle does, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphs import run_rewritten
from models import (
    ALL_TARGETS,
    ATTENTION_TARGETS,
    BATCHES,
    FFN_TARGETS,
    DecoderConfig,
    Fp64Decoder,
    batch,
    gradients,
    masked_sites,
    tiny_llama,
    variants,
    with_lora,
)
from oracle import kept_from
from sparse_compile.compiler.peft_support import make_dora_traceable
from sparse_compile.kernels.channel_selection import record_channels
from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.reference import masked_dense, output_mask_from_labels
from sweeps import slow, sweep
from tolerances import Tolerance, assert_close_rms

SITES = {"layers.0.mlp": 0.6, "layers.1.mlp": 0.9, "layers.0.self_attn": 0.5, "layers.1.self_attn": 0.7}
HF = Tolerance(max=1e-4, rms=1e-5, why="the norms of Hugging Face models compute in fp32")


def decoder(config: DecoderConfig, targets: Sequence[str] = ALL_TARGETS, **options: Any) -> nn.Module:
    if not config.gated:
        targets = [target for target in targets if target != "gate_proj"]
    model = with_lora(Fp64Decoder(replace(config, layers=2, adapters=())), targets, dora=True, **options)
    make_dora_traceable()
    return model


def check(
    model: nn.Module,
    inputs: dict[str, Tensor],
    sites: dict[str, float],
    tolerance: Tolerance | None = None,
    disable: tuple[str, ...] = ("select_loss_rows",),
) -> Any:
    """Assert that loss and gradients are those of the oracle at the channels chosen."""

    def loss(**given: Tensor) -> Tensor:
        outputs = model(**given)
        return outputs[0] if isinstance(outputs, tuple) else outputs.loss

    torch.manual_seed(0)
    with record_channels() as chosen:
        ran = run_rewritten(loss, **inputs, config=SparseLoRAConfig(layer_sparsity=sites, disable=disable))
    assert ran.result.sparse is not None, ran.result.rejections
    assert not disable or len(ran.ctx.facts.plan.sparse_sites) == len(sites), ran.result.rejections
    ran.value.backward()
    actual = gradients(model)
    names = {f".{name}": found[0] for name, found in chosen.items()}
    kept = kept_from({name.split("model.")[-1].lstrip("."): channels for name, channels in names.items()})
    torch.manual_seed(0)
    with masked_dense(masked_sites(model, kept), output_mask_from_labels(inputs["labels"])):
        expected = loss(**inputs)
    expected.backward()
    assert_close_rms(ran.value, expected, tolerance=tolerance, name="loss")
    for name, gradient in gradients(model).items():
        assert gradient.any(), name
        assert_close_rms(actual[name], gradient, tolerance=tolerance, name=name)
    assert (loss(**inputs) - expected).abs() > 1e-6
    return ran


@pytest.mark.parametrize("name", sweep(["gqa", "enable_gqa", "eager", "ungated"], "gqa"))
def test_every_kind_of_decoder(name: str) -> None:
    """Sites of both kinds, with and without bias, under every way to share heads."""
    config = variants()[name]
    ran = check(decoder(config), batch(config.vocab, padding="left"), SITES)
    assert next(record for record in ran.result.records if record.name == "factor_dora_norm").stats["norms"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["right", "packed"])
def test_every_shape_of_batch(shape: str) -> None:
    """With the end of the model on the rows of the loss alone, whose last FFN leaves the plan."""
    check(decoder(replace(DecoderConfig(), bias=True)), batch(61, **BATCHES[shape]), SITES, disable=())


@pytest.mark.slow
@pytest.mark.parametrize("targets", [ATTENTION_TARGETS, FFN_TARGETS, ("q_proj", "o_proj", "up_proj"), ("down_proj",)])
def test_dora_on_some_layers(targets: Sequence[str]) -> None:
    check(decoder(replace(DecoderConfig(), bias=True), targets), batch(61), SITES)


@pytest.mark.slow
@pytest.mark.parametrize("bias", [False, True])
def test_dropout_gives_a_product_of_its_own(bias: bool) -> None:
    """Not on the out-projection of an FFN: its two segments draw apart, so no eager run is the same."""
    targets = [target for target in ALL_TARGETS if target != "down_proj"]
    model = decoder(replace(DecoderConfig(), bias=bias), targets, dropout=0.3)
    ran = check(model, batch(61), SITES)
    assert all(projection.dora[0].product for projection in ran.ctx.facts.projections.values() if projection.dora)


def test_dropout_on_an_out_projection() -> None:
    """In expectation it is the oracle: with a dropout that drops hardly anything, so it is itself."""
    model = decoder(replace(DecoderConfig(), bias=True), ("down_proj",), dropout=1e-12)
    ran = check(model, batch(61), SITES)
    assert all(projection.dora[0].product for projection in ran.ctx.facts.projections.values() if projection.dora)


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [(True, True), (True, False), (False, True)])
def test_two_adapters(kinds: tuple[bool, bool]) -> None:
    """The second one scales what the first one made of the output."""
    from peft import LoraConfig, get_peft_model

    base = Fp64Decoder(replace(DecoderConfig(), layers=2, adapters=(), bias=True))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    first, second = (
        LoraConfig(r=3, lora_alpha=6, target_modules=targets, use_dora=dora, init_lora_weights=False) for dora in kinds
    )
    model = get_peft_model(base, first)
    model.add_adapter("second", second)
    model.base_model.set_adapter(["default", "second"])
    model.train().double()
    make_dora_traceable()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.3)
            elif "lora_" in name:
                parameter.mul_(0.3)
    ran = check(model, batch(61), SITES)
    found = [len(projection.adapters) for projection in ran.ctx.facts.projections.values() if projection.adapters]
    assert found == [2] * 12
    assert {len(p.dora) for p in ran.ctx.facts.projections.values() if p.adapters} == {sum(kinds)}


@pytest.mark.parametrize("bias", [False, slow(True)])
def test_llama(bias: bool) -> None:
    model = with_lora(tiny_llama(layers=2, dtype=torch.float64, bias=bias), ALL_TARGETS, dora=True)
    make_dora_traceable()
    check(model, batch(97, padding="right"), SITES, tolerance=HF)


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_exact_passes_alone(dropout: float, aot_eager_inductor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the backend: the loss and the gradients of eager, with the end of the model on rows of the loss alone."""
    monkeypatch.setenv("SPARSELORA_VERIFY", "1")
    model = decoder(replace(DecoderConfig(), bias=True), dropout=dropout)
    inputs = batch(61, padding="right")
    torch.manual_seed(0)
    expected = model(**inputs)[0]
    expected.backward()
    gradients_expected = gradients(model)
    torch.manual_seed(0)
    compiled = torch.compile(model, backend="sparselora", fullgraph=True, options={"preset": "exact"})
    loss = compiled(**inputs)[0]
    loss.backward()
    (graph,) = aot_eager_inductor.graphs
    called = [str(node.target) for node in graph.graph.nodes]
    assert called.count("sparselora.dora_norm.default") == 14 and "sparselora.loss_rows.default" in called
    assert_close_rms(loss, expected)
    for name, gradient in gradients(model).items():
        assert_close_rms(gradient, gradients_expected[name], name=name)
