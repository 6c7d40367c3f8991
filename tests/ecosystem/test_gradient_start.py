"""Adapters start in the top right singular vectors of the gradient, and nothing else of the model changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import batch, tiny_llama, with_lora
from sparse_compile import gradient_guided_start

pytest.importorskip("peft")

RANK = 4
BATCHES = [batch(97, rows=1, length=7, seed=seed) for seed in range(2)]  # 14 tokens: what the sketch holds is exact


def adapted(**options: Any) -> nn.Module:
    """With adapters that have been trained, on layers of several shapes."""
    model = tiny_llama(layers=2, dtype=options.pop("dtype", torch.float64))
    return with_lora(model, ("q_proj", "v_proj", "down_proj"), r=RANK, **options).double()


def parameters(model: nn.Module, part: str) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if part in name}


@contextmanager
def unchanged(model: nn.Module, *changed: str) -> Iterator[None]:
    """Check that all of a model but the parameters named is as it was."""

    def state() -> dict[str, Any]:
        named = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
        return named | {f"{name} mode": module.training for name, module in model.named_modules()}

    before, values = state(), parameters(model, "")
    yield
    assert state() == before
    for name, value in values.items():
        if not any(part in name for part in changed):
            assert torch.equal(value, model.get_parameter(name)), name
    assert not any(module._forward_hooks for module in model.modules())


def gradients_of_weights(model: nn.Module) -> dict[str, Tensor]:
    """The plain definition: the gradient of the frozen weights by autograd, adapters off."""
    weights = {name: p for name, p in model.named_parameters() if "base_layer.weight" in name}
    model.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
    with model.disable_adapter():
        loss = sum(model(**inputs).loss for inputs in BATCHES)
    found = torch.autograd.grad(loss, list(weights.values()))
    return dict(zip((name.removesuffix(".base_layer.weight") for name in weights), found, strict=True))


def test_it_is_the_plain_definition() -> None:
    model = adapted()
    with torch.no_grad(), model.disable_adapter():
        without = model(**BATCHES[0]).loss
    model.train()
    next(iter(model.parameters())).requires_grad_(True)  # what else is trained stays so, without a gradient
    model.get_submodule("base_model.model.model.layers.1").eval()
    with unchanged(model, "lora_"):
        gradient_guided_start(model, iter(BATCHES))
    with torch.no_grad():
        torch.testing.assert_close(model(**BATCHES[0]).loss, without)
    assert not any(b.any() for b in parameters(model, "lora_B").values())
    a = parameters(model, "lora_A")
    gradients = gradients_of_weights(model)
    assert len(a) == len(gradients) == 6
    for name, gradient in gradients.items():
        expected = torch.linalg.svd(gradient).Vh[:RANK]
        overlaps = a[f"{name}.lora_A.default.weight"] @ expected.t()
        torch.testing.assert_close(overlaps.abs(), torch.eye(RANK, dtype=torch.float64), rtol=0, atol=1e-4, msg=name)


def test_a_wide_gradient_is_approximated() -> None:
    """More directions than are followed: nearly as much of the gradient as any rank can hold, the same each time."""
    model = tiny_llama(layers=1, dtype=torch.float64)
    model = with_lora(model, ("down_proj",), r=2).double()
    inputs = [batch(97, rows=4, length=32)]
    gradient_guided_start(model, inputs)
    (a,) = parameters(model, "lora_A").values()
    gradient_guided_start(model, inputs)
    torch.testing.assert_close(a, next(iter(parameters(model, "lora_A").values())))
    torch.testing.assert_close(a @ a.t(), torch.eye(2, dtype=torch.float64))
    model.requires_grad_(False)
    weight = model.get_parameter("base_model.model.model.layers.0.mlp.down_proj.base_layer.weight").requires_grad_(True)
    (gradient,) = torch.autograd.grad(model(**inputs[0]).loss, [weight])
    best = torch.linalg.svdvals(gradient)
    assert (gradient @ a.t()).norm() > 0.98 * best[:2].norm()
    assert len(best) > 2 + 10 and best[13] > 1e-3 * best[0]


def test_low_precision_and_a_compiled_model() -> None:
    """Adapters in fp32 on a bf16 base; a compiled model runs its own code, and stays compiled."""
    model = with_lora(tiny_llama(layers=1, dtype=torch.bfloat16), ("v_proj",), r=RANK)

    def never(*_: Any) -> Any:
        raise AssertionError("compiled code ran")

    model.compile(backend=never)
    gradient_guided_start(model, BATCHES)
    assert model._compiled_call_impl is not None
    (a,) = parameters(model, "lora_A").values()
    assert a.dtype == torch.float32
    torch.testing.assert_close(a @ a.t(), torch.eye(RANK), rtol=0, atol=1e-5)


def test_conv1d_layers() -> None:
    """GPT-2 stores its weights as (in, out); A is (r, in) all the same."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=97, n_positions=32)
    model = with_lora(transformers.GPT2LMHeadModel(config), ("c_attn",), r=2)
    gradient_guided_start(model, BATCHES)
    (a,) = parameters(model, "lora_A").values()
    model.requires_grad_(False)
    weight = model.get_parameter("base_model.model.transformer.h.0.attn.c_attn.base_layer.weight").requires_grad_(True)
    model.eval()
    (gradient,) = torch.autograd.grad(sum(model(**inputs).loss for inputs in BATCHES), [weight])
    expected = torch.linalg.svd(gradient.t()).Vh[:2]
    torch.testing.assert_close((a @ expected.t()).abs(), torch.eye(2), rtol=0, atol=1e-3)


def no_labels(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"input_ids": inputs["input_ids"]}


def no_loss(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**inputs, "labels": torch.full_like(inputs["labels"], -100)}


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "needs at least one batch"),
        ([no_labels(BATCHES[0])], "returned no loss"),
        ([BATCHES[0], no_loss(BATCHES[1])], "the loss of batch 1 is nan"),
    ],
    ids=["none", "no labels", "not finite"],
)
def test_bad_batches_leave_the_model_alone(batches: list[Any], message: str) -> None:
    model = adapted()
    with unchanged(model), pytest.raises(ValueError, match=message):
        gradient_guided_start(model, batches)


def test_bad_models_are_named() -> None:
    with pytest.raises(ValueError, match="LoRA adapters on linear layers; this has none"):
        gradient_guided_start(nn.Linear(3, 4), BATCHES)
    with pytest.raises(ValueError, match=r"q_proj cannot be started .* weight-decomposed"):
        gradient_guided_start(adapted(dora=True), BATCHES)
    merged = adapted()
    merged.merge_adapter()
    with pytest.raises(ValueError, match=r"q_proj cannot be started .* is merged"):
        gradient_guided_start(merged, BATCHES)
    # 32 outputs of the two key/value heads.
    wide = with_lora(tiny_llama(layers=1), ("k_proj",), r=40)
    with pytest.raises(ValueError, match="a gradient of 32 x 64 has no 40 singular vectors"):
        gradient_guided_start(wide, BATCHES)


def test_a_layer_that_does_not_run_is_named() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(6, 5), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x).square().mean()

    model = with_lora(Idle(), ("used", "idle"), r=2)
    with unchanged(model), pytest.raises(ValueError, match=r"no gradient reaches .*\.idle"):
        gradient_guided_start(model, [{"x": torch.randn(4, 6)}])
