"""Blocks that are cut out compute what they did, a timed step leaves the model alone, and clocks are read right."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models import ALL_TARGETS, batch, fp64_decoder, tiny_llama, with_lora
from sparse_compile import SparseLoRAConfig
from sparse_compile.calibration import timing
from sparse_compile.calibration.costs import samples_of
from sparse_compile.calibration.taps import TappedModel
from sparse_compile.calibration.timing import Untimed, block_seconds, map_seconds, median_seconds, step_seconds
from sparse_compile.options.recipe import AffineMap

CPU = torch.device("cpu")


# --- Clocks -----------------------------------------------------------------------------------------------------------


def test_the_median_leaves_out_the_first_run_and_outliers() -> None:
    pauses = iter([0.2, 0.001, 0.1, 0.001])
    assert 0.001 <= median_seconds(lambda: time.sleep(next(pauses)), CPU, 3) < 0.05
    assert next(pauses, None) is None


def test_no_run_begins_after_the_time_is_up() -> None:
    runs: list[None] = []
    median_seconds(lambda: (time.sleep(0.02), runs.append(None)), CPU, 100, allowed=0.05)
    assert 2 <= len(runs) <= 5
    runs.clear()
    median_seconds(lambda: runs.append(None), CPU, 100, allowed=0.0)
    assert len(runs) == 2, "one that counts is made in any case"


# --- The step ---------------------------------------------------------------------------------------------------------


class Drifting(nn.Module):
    """A model that changes a buffer and draws random numbers in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.model = fp64_decoder(layers=1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, **inputs: Tensor) -> Any:
        self.calls += 1
        loss, _ = self.model(**inputs)
        return nn.functional.dropout(loss + 1, 0.01)


def test_a_timed_step_leaves_the_model_as_it_is() -> None:
    model, inputs = Drifting(), batch(61)
    model(**inputs).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    generator, calls = torch.get_rng_state(), model.calls.clone()
    assert gradients and step_seconds(model, inputs) > 0
    assert torch.equal(torch.get_rng_state(), generator) and torch.equal(model.calls, calls) and model.training
    assert all(torch.equal(model.get_parameter(name).grad, each) for name, each in gradients.items())


def test_a_timed_step_is_forward_and_backward_of_the_eager_model(eager_inductor: Any) -> None:
    model, inputs, seen = fp64_decoder(layers=1), batch(61), []
    model.compile(backend="sparselora", options={"layer_sparsity": {"mlp": 0.5}})
    model.layers[0].mlp.register_forward_hook(lambda *_: seen.append("forward"))
    model.embed_tokens.weight.requires_grad_(True).register_hook(lambda _: seen.append("backward"))
    step_seconds(model, inputs)
    assert seen == ["forward", "backward"] * (timing.STEP_FORWARDS // 2)
    assert eager_inductor.graphs == []


class Reentrant(nn.Module):
    """A model whose layers are in a re-entrant checkpoint."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        leaf = torch.zeros((), requires_grad=True)
        return checkpoint(lambda _: self.model(**inputs)[0], leaf, use_reentrant=True)  # type: ignore[no-any-return]


def test_what_cannot_be_timed_is_told() -> None:
    model, inputs = fp64_decoder(layers=1), batch(61)
    with pytest.raises(Untimed, match=r"gradients reach 0 of 14 trained tensors .*re-entrant"):
        step_seconds(Reentrant(model), inputs)
    with pytest.raises(Untimed, match="nothing of the model is trained"):
        step_seconds(model.requires_grad_(False), inputs)
    with pytest.raises(Untimed, match=r"backward fails: .*does not require grad"):
        step_seconds(Detached(), inputs)


class Detached(nn.Linear):
    """A model whose loss depends on nothing that is trained."""

    def __init__(self) -> None:
        super().__init__(1, 1)

    def forward(self, **_: Tensor) -> Tensor:  # type: ignore[override]
        return torch.zeros(())


# --- Blocks -----------------------------------------------------------------------------------------------------------


def tapped(model: nn.Module, inputs: dict[str, Tensor]) -> TappedModel:
    run = TappedModel(model, SparseLoRAConfig())
    run(inputs)
    return run


@pytest.mark.parametrize("kind", ["decoder", "llama"])
def test_a_block_alone_computes_what_it_does_in_the_model(kind: str) -> None:
    model, inputs = fp64_decoder(layers=2), batch(61)
    if kind == "llama":
        model, inputs = with_lora(tiny_llama(layers=2), ALL_TARGETS), batch(97)
    run = tapped(model, inputs)
    assert len(run.blocks) == 2
    for name, block in run.blocks.items():
        module = next(each for path, each in model.named_modules() if path.endswith(name))
        x = samples_of(run, inputs)[name].x.requires_grad_()
        found, expected = block(x), module(x)
        assert torch.equal(found, expected)
        trained = [each for each in module.parameters() if each.requires_grad]
        assert {id(each) for each in block.trained} == {id(each) for each in trained} and trained
        (gradient,), (wanted,) = (torch.autograd.grad(y.sum(), x) for y in (found, expected))
        assert torch.equal(gradient, wanted)


def test_blocks_of_one_shape_have_one_signature() -> None:
    run = tapped(fp64_decoder(layers=2), batch(61))
    first, second = run.blocks.values()
    assert first.signature == second.signature
    (wider,) = tapped(fp64_decoder(layers=1, ffn=64), batch(61)).blocks.values()
    (plain,) = tapped(fp64_decoder(layers=1, adapters=("q_proj",)), batch(61)).blocks.values()
    assert len({first.signature, wider.signature, plain.signature}) == 3


def test_a_block_below_all_adapters_gets_no_gradient() -> None:
    model = fp64_decoder(layers=2, adapters=("q_proj",))
    for parameter in model.layers[0].parameters():
        parameter.requires_grad_(False)
    first, second = tapped(model, batch(61)).taps.values()
    assert (first.differentiated, second.differentiated) == (False, True)
    assert second.flops == 2 * first.flops == 3 * 4 * 32 * 48
    assert second.map_flops(5) == 2 * first.map_flops(5) == 4 * 5 * 64


class Doubling(nn.Module):
    """Stands in for a block that takes a while, in each direction."""

    trained = ()

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.004)
        x.register_hook(lambda _: time.sleep(0.004)) if x.requires_grad else None
        return 2 * x


@pytest.mark.parametrize(("differentiated", "least"), [(True, 0.008), (False, 0.004)])
def test_a_block_is_timed_with_its_backward(differentiated: bool, least: float) -> None:
    block: Any = Doubling()
    taken = block_seconds(block, torch.zeros(2, 3), differentiated=differentiated, allowed=1.0)
    assert least <= taken < 0.1


def test_a_map_is_timed_for_context_tokens_alone() -> None:
    """Of a wide map the time grows with the number of context tokens."""
    affine = AffineMap(torch.randn(256, 512), torch.randn(512, 256), torch.randn(512))
    x = torch.randn(8, 256, 512)
    few, all_of_them = torch.zeros(8, 256, dtype=torch.bool), torch.ones(8, 256, dtype=torch.bool)
    few[:, :8] = True
    taken = [
        map_seconds(affine, x, mask, torch.float32, differentiated=True, allowed=1.0) for mask in (few, all_of_them)
    ]
    assert 0 < taken[0] < taken[1]
    assert not x.requires_grad
