"""Activation checkpointing: whatever is recomputed in the backward is what the forward computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from decoder import rope
from models import ALL_TARGETS, Fp64Decoder, batch, fp64_decoder, gradients, tiny_llama, with_lora
from oracle import (
    SPARSITY,
    Step,
    assert_differs,
    assert_same_step,
    kept_from,
    oracle_step,
    sparse_step,
    told,
    train_step,
)
from sparse_compile import token_roles
from sparse_compile.kernels.channel_selection import record_channels
from tolerances import Tolerance

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

HF_FP64 = Tolerance(max=1e-5, rms=1e-5, why="Hugging Face's norms compute in fp32 whatever the dtype.")
REENTRANT = pytest.mark.parametrize("use_reentrant", [True, False], ids=["re-entrant", "non-re-entrant"])


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="sparselora", options={"layer_sparsity": SPARSITY, "strict": True, **options})


def checkpointed_llama(use_reentrant: bool) -> nn.Module:
    """A PEFT model with checkpointing as a training script enables it: its hook cuts the graph behind the embedding."""
    model = with_lora(tiny_llama(layers=2, dtype=torch.float64), ALL_TARGETS)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    return model


def roles_around(call: Callable[..., Any]) -> Callable[..., Any]:
    """Give the roles for the forward alone: the backward runs when the block has closed."""

    def forward(**inputs: Tensor) -> Any:
        with token_roles(labels=inputs["labels"]):
            return call(**inputs)

    return forward


# --- One graph --------------------------------------------------------------------------------------------------------


@REENTRANT
def test_without_the_hook_it_is_one_sparse_graph(use_reentrant: bool, aot_eager_inductor: Any) -> None:
    model = checkpointed_llama(use_reentrant)
    inputs = batch(97, padding="right")
    expected_dense = train_step(model, model, inputs)
    model.disable_input_require_grads()
    step, kept = sparse_step(model, compiled(model), inputs)
    assert aot_eager_inductor.sparse == [True]
    model.enable_input_require_grads()
    assert_same_step(step, oracle_step(model, kept, inputs), torch.float64, tolerance=HF_FP64)
    assert_differs(step, expected_dense)


# --- Given roles ------------------------------------------------------------------------------------------------------


@REENTRANT
def test_with_the_hook_and_roles_the_decoder_stack_is_sparse(use_reentrant: bool, aot_eager_inductor: Any) -> None:
    model = checkpointed_llama(use_reentrant)
    inputs = batch(97, padding="right")
    with told() as messages:
        step, kept = sparse_step(model, roles_around(compiled(model)), inputs)
    assert messages == []
    assert aot_eager_inductor.sparse == [False, True, False]
    assert len(kept) == len(SPARSITY)
    assert_same_step(step, oracle_step(model, kept, inputs), torch.float64, tolerance=HF_FP64)


class Stack(nn.Module):
    """The blocks of a decoder and nothing else: the first operator of its graph belongs to a checkpoint."""

    def __init__(self, model: Fp64Decoder) -> None:
        super().__init__()
        self.layers = model.layers

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, cos, sin, None, use_reentrant=False)
        return x


def through_stack(model: Fp64Decoder, stack: Callable[..., Tensor]) -> Callable[..., tuple[Tensor]]:
    """Run a decoder with its blocks by `stack`, which alone sees the roles."""

    def forward(input_ids: Tensor, labels: Tensor) -> tuple[Tensor]:
        x = model.embed_tokens(input_ids)
        positions = rope(torch.arange(input_ids.shape[1])[None], model.config.head_dim, x.dtype)
        with token_roles(labels=labels):
            x = stack(x, *positions)
        logits = model.lm_head(model.norm(x))
        return (F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1)),)

    return forward


def test_roles_closed_before_the_backward(aot_eager_inductor: Any) -> None:
    model = fp64_decoder(layers=2)
    inputs = batch(61)
    step, kept = sparse_step(model, through_stack(model, compiled(Stack(model))), inputs)
    assert kept.keys() == SPARSITY.keys()
    assert_same_step(step, oracle_step(model, kept, inputs), torch.float64)


@pytest.mark.parametrize("open_in_backward", [False, True])
def test_two_forwards_with_roles_of_their_own_before_one_backward(
    open_in_backward: bool, aot_eager_inductor: Any
) -> None:
    """Each recomputation reads the roles of its own forward: neither those of the other nor those open now."""
    model = fp64_decoder(layers=2)
    call = through_stack(model, compiled(Stack(model)))
    batches = [batch(61, seed=seed, prompts=prompts) for seed, prompts in enumerate(([3, 9, 12], [11, 2, 7]))]
    with record_channels() as record:
        losses = [call(**inputs)[0] for inputs in batches]
    chosen = [kept_from({site: choices[i] for site, choices in record.items()}) for i in (0, 1)]
    newer = token_roles(output_mask=torch.ones(3, 16, dtype=torch.bool)) if open_in_backward else nullcontext()
    with newer, record_channels() as again:
        sum(losses).backward()
    assert not again, "a choice was made again in the backward"
    actual = Step(sum(losses).detach(), gradients(model))
    steps = [oracle_step(model, kept, inputs) for kept, inputs in zip(chosen, batches, strict=True)]
    expected = {name: steps[0].gradients[name] + steps[1].gradients[name] for name in steps[0].gradients}
    assert_same_step(actual, Step(steps[0].loss + steps[1].loss, expected), torch.float64)
    assert aot_eager_inductor.runs == [2]
