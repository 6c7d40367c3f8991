"""Run one training step compiled and one through the oracle, and compare loss and gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models import Kept, gradients, masked_sites
from sparse_compile.kernels.channel_selection import record_channels
from sparse_compile.reference import masked_dense, output_mask_from_labels
from tolerances import Tolerance, assert_close_rms

SPARSITY = {"layers.0.mlp": 0.6, "layers.1.mlp": 0.9, "layers.0.self_attn": 0.5, "layers.1.self_attn": 0.7}
"""Every kind of site in two blocks, so that one sparse block reads what another wrote."""


class Step(NamedTuple):
    """What one training step gave: the loss, and the gradient of every trained parameter by name."""

    loss: Tensor
    gradients: dict[str, Tensor]


def train_step(
    model: nn.Module, call: Callable[..., Any], inputs: Mapping[str, Tensor], seed: int | None = None
) -> Step:
    """Run forward and backward; take the gradients. A seed makes dropout draw the same each time."""
    if seed is not None:
        torch.manual_seed(seed)
    outputs = call(**inputs)
    loss = outputs[0] if isinstance(outputs, tuple) else outputs.loss
    loss.backward()
    return Step(loss.detach(), gradients(model))


def sparse_step(
    model: nn.Module,
    call: Callable[..., Any],
    inputs: Mapping[str, Tensor],
    seed: int | None = None,
    context: AbstractContextManager[Any] | None = None,
) -> tuple[Step, Kept]:
    """Run a compiled training step; return the channels that it chose as well, by site name.

    A site chooses once a step: in the backward of a checkpointed block the choice is not made again.
    """
    with record_channels() as record, context or nullcontext():
        step = train_step(model, call, inputs, seed)
    assert all(len(choices) == 1 for choices in record.values()), {name: len(c) for name, c in record.items()}
    return step, kept_from({name: choices[0] for name, choices in record.items()})


def kept_from(record: Mapping[str, Tensor]) -> Kept:
    """Pair the two choices of each attention site."""
    kept: dict[str, Tensor | tuple[Tensor, Tensor]] = {}
    for name, channels in record.items():
        site, _, part = name.partition(":")
        if not part:
            kept[site] = channels
        elif part == "qk":
            kept[site] = (channels, record[f"{site}:vo"])
    return kept


def oracle_step(
    model: nn.Module,
    kept: Kept,
    inputs: Mapping[str, Tensor],
    seed: int | None = None,
    call: Callable[..., Any] | None = None,
) -> Step:
    """Run the masked-dense step of the eager model with the channels given."""
    with masked_dense(masked_sites(model, kept), output_mask_from_labels(inputs["labels"])):
        return train_step(model, call or model, inputs, seed)


def assert_same_step(
    actual: Step, expected: Step, dtype: torch.dtype, *, tolerance: Tolerance | None = None, what: str = ""
) -> None:
    """Assert that loss and every gradient agree to the tolerance of a dtype."""
    assert actual.gradients.keys() == expected.gradients.keys() != set()
    assert_close_rms(actual.loss, expected.loss, dtype, tolerance=tolerance, name=f"{what} loss")
    for name, gradient in expected.gradients.items():
        assert gradient.any(), f"{what} {name}: an expected gradient of zeros tests nothing"
        assert_close_rms(actual.gradients[name], gradient, dtype, tolerance=tolerance, name=f"{what} d {name}")


def assert_differs(actual: Step, other: Step, share: float = 1e-2) -> None:
    """Assert that no gradients agree: that sparsity did something, where the test rests on it."""
    for name, gradient in other.gradients.items():
        assert (actual.gradients[name] - gradient).norm() > share * gradient.norm(), name


@contextmanager
def told() -> Iterator[list[str]]:
    """Collect what the backend warns of inside the block; warnings of others are dropped."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages += [text for text in (str(w.message) for w in caught) if "sparselora" in text or "layer_sparsity" in text]
