"""Pruned models through the backend: precisions, checkpoints, sparsity beside masks, and what is declined."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from models import ATTENTION_TARGETS, batch, gradients, masked_sites, random_mask, tiny_llama, with_lora
from sparse_compile import merge_masked
from sparse_compile.compiler.peft_support import lora_layers
from sparse_compile.kernels.channel_selection import record_channels
from sparse_compile.kernels.masked_linear import masked_weight
from sparse_compile.kernels.masked_linear.pattern import zero_fraction
from sparse_compile.reference import masked_dense, output_mask_from_labels
from sweeps import sweep
from tolerances import assert_close_rms

pytest.importorskip("peft")

pytestmark = pytest.mark.usefixtures("aot_eager_inductor")

TARGETS = ("q_proj", "down_proj")
EXACT = {"preset": "none", "preserve_weight_mask": "auto", "mask_gradient": "exact"}


def prune(model: nn.Module, *parts: str) -> nn.Module:
    """Set 40% of the weights with one of these names to zero."""
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        if any(part in name for part in parts):
            parameter.data.mul_(random_mask(*parameter.shape, seed=seed))
    return model


def pruned_llama(targets: tuple[str, ...] = TARGETS, dropout: float = 0.0, **options: Any) -> nn.Module:
    return with_lora(prune(tiny_llama(**{"layers": 1, **options}), *targets), targets, dropout=dropout)


class Masked(nn.Module):
    """A pruned layer as one would write it, with the masked weight merged in fp32 and rounded once."""

    def __init__(self, layer: Any):
        super().__init__()
        base = layer.get_base_layer()
        self.weight, self.bias = base.weight, base.bias
        self.stored_transposed = layer.fan_in_fan_out
        self.lora_A, self.lora_B, self.scale = layer.lora_A, layer.lora_B, layer.scaling["default"]

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.t() if self.stored_transposed else self.weight
        x = x.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else x
        merged = masked_weight(weight, self.lora_A.default.weight, self.lora_B.default.weight, self.scale, x.dtype)
        return F.linear(x, merged, None if self.bias is None else self.bias.to(x.dtype))


def plain(model: nn.Module) -> nn.Module:
    """Return a copy whose pruned layers are masked by autograd; its parameters have the names of the model's."""
    copied = copy.deepcopy(model)
    for name, layer in lora_layers(copied).items():
        if zero_fraction(layer.get_base_layer().weight) > 0.3:
            parent, _, child = name.rpartition(".")
            setattr(copied.get_submodule(parent), child, Masked(layer))
    return copied


@contextmanager
def told(*expected: str) -> Iterator[None]:
    """Check that there is one warning of ours that says all this, or none."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield
    ours = [str(each.message) for each in seen if "sparselora" in str(each.message)]
    assert len(ours) == bool(expected), ours
    for text in expected:
        assert text in ours[0]


def same_step(model: nn.Module, call: Any, expected_of: nn.Module, inputs: dict[str, Tensor], dtype: Any) -> None:
    """Compare loss and gradients of the adapters."""
    loss = call(**inputs).loss
    loss.backward()
    actual = gradients(model)
    expected_loss = expected_of(**inputs).loss
    expected_loss.backward()
    assert_close_rms(loss, expected_loss, dtype, name="loss")
    expected = gradients(expected_of)
    assert actual.keys() == expected.keys() and actual
    for name, gradient in expected.items():
        assert gradient.any(), name
        assert_close_rms(actual[name], gradient, dtype, name=name)


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="sparselora", options={**EXACT, **options})


@pytest.mark.parametrize("precision", sweep(["fp32", "bf16 base", "autocast"], "bf16 base"))
def test_precisions(precision: str, aot_eager_inductor: Any) -> None:
    """Adapters are fp32 on a bf16 base, as PEFT keeps them; autocast decides the dtype of the products."""
    base = torch.bfloat16 if precision == "bf16 base" else torch.float32
    model = pruned_llama(dtype=base)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    region = torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else nullcontext()
    with told(), region:
        same_step(
            model, compiled(model), plain(model), batch(97), torch.float32 if precision == "fp32" else torch.bfloat16
        )
    (graph,) = aot_eager_inductor.graphs
    assert [str(node.target) for node in graph.graph.nodes].count("sparselora.masked_linear.default") == 2


def test_checkpointing() -> None:
    model = pruned_llama()
    expected = plain(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.disable_input_require_grads()
    with told():
        same_step(model, compiled(model), expected, batch(97), torch.float32)


def test_contextual_sparsity_beside_masks() -> None:
    """The attention is pruned and masked, the feed-forward block is whole and sparse: both in one graph."""
    model = pruned_llama(ATTENTION_TARGETS, layers=2)
    inputs = batch(97)
    call = compiled(model, layer_sparsity={"layers.0.mlp": 0.5}, start_step=0, keep_logits=True)
    expected = plain(model)
    with told(), record_channels() as chosen:
        loss = call(**inputs).loss
    loss.backward()
    ((name, (channels,)),) = chosen.items()
    assert name.endswith(".layers.0.mlp")
    (site,) = masked_sites(expected, {name: channels})
    with masked_dense([site], output_mask_from_labels(inputs["labels"])):
        expected_loss = expected(**inputs).loss
    expected_loss.backward()
    assert_close_rms(loss, expected_loss, name="loss")
    actual = gradients(model)
    for parameter, gradient in gradients(expected).items():
        assert_close_rms(actual[parameter], gradient, name=parameter)


def test_dropout_is_declined_while_it_drops() -> None:
    """In training it is another function than any merged weight's; in evaluation it is none."""
    model = pruned_llama(("q_proj",), dropout=0.1)
    call, inputs = compiled(model), batch(97)
    with told("self_attn.q_proj: the adapter's input is dropped out"):
        for _ in range(2):
            call(**inputs).loss.backward()
    model.eval()
    with told(), torch.no_grad():
        assert_close_rms(call(**inputs).loss, plain(model)(**inputs).loss)


@pytest.mark.slow
def test_conv1d() -> None:
    """GPT-2 stores its weights as (in, out)."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=16, vocab_size=97, n_positions=32, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    targets = ("c_attn", "c_fc")
    model = with_lora(prune(transformers.GPT2LMHeadModel(config), *targets), targets)
    before = {name: layer.get_base_layer().weight.detach().clone() for name, layer in lora_layers(model).items()}
    call, inputs = compiled(model), batch(97)
    with told():
        same_step(model, call, plain(model), inputs, torch.float32)
        with torch.no_grad():
            trained = call(**inputs).loss
    merged = merge_masked(model)
    assert_close_rms(merged(**inputs).loss, trained)
    for name, weight in before.items():
        after = merged.get_submodule(name.removeprefix("base_model.model.")).weight
        assert torch.equal(after == 0, weight == 0) and not torch.equal(after, weight)


def test_a_tied_weight_is_declined() -> None:
    """Merging would change the embedding as well."""
    model = with_lora(prune(tiny_llama(layers=1, tied=True), "embed_tokens"), ("lm_head",))
    with told("something else reads its weight (a tied embedding?)"):
        compiled(model)(**batch(97)).loss.backward()


def test_a_packed_weight_is_declined() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)

        def forward(self, x: Tensor) -> Tensor:
            return self.q_proj(x).square().mean()

    model = with_lora(Model().to("cpu"), ("q_proj",))
    x = torch.randn(4, 64)
    expected = model(x)
    call = compiled(model)
    with told("found no pruned layer with an adapter", "its weight is packed in 4 or 8 bits"):
        for _ in range(2):
            loss = call(x)
    assert_close_rms(loss, expected)


# --- Merging ----------------------------------------------------------------------------------------------------------


def two_of_four(weight: Tensor) -> Tensor:
    groups = weight.detach().clone().reshape(-1, 4)
    return groups.scatter_(1, groups.abs().argsort(1)[:, :2], 0.0).reshape(weight.shape)


def merged_two_of_four(dtype: torch.dtype) -> Tensor:
    """Return a merged 2:4 weight, (128, 128)."""
    base = nn.Sequential(nn.Linear(128, 128, bias=False, dtype=dtype))
    base[0].weight.data = two_of_four(base[0].weight)
    model = with_lora(base, ("0",))
    return merge_masked(model)[0].weight.detach()  # type: ignore[index]


def test_a_merged_weight_is_still_two_of_four() -> None:
    weight = merged_two_of_four(torch.bfloat16)
    assert ((weight.reshape(-1, 4) != 0).sum(1) == 2).all()


@pytest.mark.gpu
def test_a_merged_weight_becomes_semi_structured() -> None:
    weight = merged_two_of_four(torch.bfloat16).cuda()
    x = torch.randn(32, 128, dtype=torch.bfloat16, device="cuda")
    packed = torch.sparse.to_sparse_semi_structured(weight)
    assert_close_rms(F.linear(x, packed), F.linear(x, weight), torch.bfloat16)


def test_low_precision_adapters_merge_to_the_weight_that_was_trained() -> None:
    """B A is not rounded on its way: bit by bit the weight of the masked product."""
    model = pruned_llama(("q_proj",), dtype=torch.bfloat16).bfloat16()
    ((name, layer),) = lora_layers(model).items()
    expected = masked_weight(
        layer.get_base_layer().weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight, 2.0
    )
    merged = merge_masked(model).get_submodule(name.removeprefix("base_model.model."))
    assert torch.equal(merged.weight, expected)
