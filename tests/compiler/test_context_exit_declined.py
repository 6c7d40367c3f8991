"""Where context cannot leave, the report says why, and training is what it is without the option."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from exited import trained
from models import batch, fp64_decoder
from oracle import Step, assert_same_step, oracle_step, sparse_step, told, train_step
from sparse_compile import token_roles
from sparse_compile.kernels.channel_selection import record_channels
from sparse_compile.reference import MaskedFFN, masked_dense, output_mask_from_labels
from sparse_compile.training.session import session_for
from sweeps import slow, sweep

pytestmark = pytest.mark.usefixtures("eager_inductor")

SITE = "layers.0.mlp"
"""A site that is sparse all the same."""


class Returning(nn.Module):
    """A decoder that returns more than its loss and logits."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.model = fp64_decoder(layers=3)
        self.what = what

    def forward(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        seen: list[Tensor] = []
        handle = self.model.layers[1 if self.what == "stream" else 2].register_forward_hook(
            lambda *given: seen.append(given[2])
        )
        outputs = self.model(**inputs)
        handle.remove()
        return (*outputs, *seen)


class TwoLosses(nn.Module):
    """A second loss of all logits."""

    def __init__(self) -> None:
        super().__init__()
        self.model = fp64_decoder(layers=3)

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        loss, logits = self.model(input_ids, labels)
        return loss + 1e-3 * logits.logsumexp(-1).square().mean(), logits


class Narrowing(nn.Module):
    """Queries that read half of the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.model = fp64_decoder(layers=3)
        for layer in self.model.layers[1:]:
            norm = layer.input_layernorm.forward
            layer.input_layernorm.forward = lambda x, norm=norm: norm(x) + 0.1 * norm(x).mean(1, keepdim=True)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        return self.model(input_ids, labels)


DECLINED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "keep_logits": (
        lambda: fp64_decoder(layers=3),
        {"keep_logits": True},
        "keep_logits asks for every row of the logits",
    ),
    "select_loss_rows disabled": (
        lambda: fp64_decoder(layers=3),
        {"disable": ["select_loss_rows"]},
        "select_loss_rows is disabled, so the end of the model is computed for all tokens",
    ),
    "hidden states of the exit": (lambda: Returning("stream"), {}, "reads the residual stream of all tokens"),
    "hidden states of the end": (lambda: Returning("last"), {}, "the graph returns it for all rows"),
    "two losses": (TwoLosses, {}, "reads it for all rows"),
    "a norm over tokens": (Narrowing, {}, "token"),
    "exit_context disabled": (
        lambda: fp64_decoder(layers=3),
        {"disable": ["exit_context"]},
        "exit_context is disabled",
    ),
}


def reasons(model: nn.Module) -> str:
    """Return all that the report of the last graph says of what was declined."""
    report = session_for(trained(model)).reports[-1]
    return "\n".join([*(each.reason for each in report.rejections), *(site.reason for site in report.sites)])


def compiled(model: nn.Module, **options: Any) -> Any:
    options = {"layer_sparsity": {SITE: 0.6}, "context_exit": 0.34, "start_step": 0, **options}
    return torch.compile(model, backend="sparselora", dynamic=False, options=options)


@pytest.mark.parametrize("name", sweep(DECLINED, "keep_logits"))
def test_a_declined_exit_leaves_the_other_sites_as_they_are(name: str) -> None:
    build, options, reason = DECLINED[name]
    model, inputs = build(), batch(61)
    step, kept = sparse_step(model, compiled(model, strict=True, **options), inputs)
    assert list(kept) in ([SITE], [f"model.{SITE}"])
    assert_same_step(step, oracle_step(model, {SITE: kept.popitem()[1]}, inputs), torch.float64)
    assert reason in reasons(model)
    assert not session_for(trained(model)).online_maps, "no step waits for a map"


@pytest.mark.parametrize("selection", ["random_dense", slow("all_sparse")])
def test_tokens_that_are_selected_otherwise(selection: str) -> None:
    model, inputs = fp64_decoder(layers=2), batch(61)
    call = compiled(model, context_exit=0.5, layer_sparsity={}, token_selection=selection)
    assert_same_step(train_step(model, call, inputs), train_step(model, model, inputs), torch.float64)
    assert f"token_selection={selection!r} leaves rows of the loss in the context" in reasons(model)


class WithoutLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = fp64_decoder(layers=2)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids)[1]


@pytest.mark.parametrize("given", [True, slow(False)])
def test_labels_that_are_not_in_the_graph(given: bool) -> None:
    """Roles that are given say nothing of what the loss reads: the user computes it."""
    model, inputs = WithoutLoss(), batch(61)
    call = compiled(model, context_exit=0.5, layer_sparsity={}) if given else compiled(model, context_exit=0.5)
    with token_roles(labels=inputs["labels"]) if given else nullcontext(), told():
        logits = call(inputs["input_ids"])
    expected = model(inputs["input_ids"])
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    assert "the loss is not in the graph, so nothing shows that it reads output tokens alone" in reasons(model)


@pytest.mark.slow
def test_given_roles_leave_other_sites_sparse() -> None:
    model, inputs = WithoutLoss(), batch(61)

    def step(call: Any) -> Step:
        def outputs(input_ids: Tensor, labels: Tensor) -> tuple[Tensor]:
            logits = call(input_ids)
            return (F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()),)

        return train_step(model, outputs, inputs)

    with token_roles(labels=inputs["labels"]), record_channels() as record:
        actual = step(compiled(model, context_exit=0.5))
    ((name, (kept,)),) = record.items()
    assert name == f"model.{SITE}"
    site = MaskedFFN(model.model.layers[0].mlp.down_proj, kept)
    with masked_dense([site], output_mask_from_labels(inputs["labels"])):
        assert_same_step(actual, step(model), torch.float64)


def test_blocks_that_are_compiled_one_by_one() -> None:
    model, inputs = fp64_decoder(layers=2), batch(61)
    options = {"layer_sparsity": {}, "context_exit": 0.5, "start_step": 0}
    for layer in model.layers:
        layer.compile(backend="sparselora", dynamic=False, options=options)
    eager = fp64_decoder(layers=2)
    with told():
        actual = train_step(model, model, inputs)
    assert_same_step(actual, train_step(eager, eager, inputs), torch.float64)
    assert "the model is compiled in parts, and context leaves for the rest of the whole" in reasons(model)
