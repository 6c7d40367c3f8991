"""Token roles are found from the loss by dataflow, whatever its spelling; the mask is that of the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from graphs import IGNORE, Captured, capture, frozen, rejections, run_passes, tokens
from models import BATCHES, batch, normal, tiny_llama
from sparse_compile.graph.facts import TokenRoles
from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.passes.protocol import PassOutcome

PASSES = ("canonicalize_linears", "trace_roles")
V = 11


class Model(nn.Module):
    """Logits, and a loss of them and the inputs."""

    def __init__(self, loss: Callable[..., Tensor], vocab: int = V):
        super().__init__()
        self.loss = loss
        self.embed, self.head = nn.Embedding(vocab, 4), nn.Linear(4, vocab)
        self.probe = nn.Linear(4, 1)
        frozen(self)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.loss(self.head(self.embed(inputs[0])), *inputs)


def trace(
    loss: Callable[..., Tensor], *inputs: Tensor, config: SparseLoRAConfig | None = None, **kwargs: object
) -> tuple[Captured, PassOutcome]:
    captured = capture(Model(loss), *(inputs or tokens()), config=config, **kwargs)  # type: ignore[arg-type]
    return captured, run_passes(captured, *PASSES)["trace_roles"]


def hugging_face(logits: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    labels = F.pad(labels, (0, 1), value=IGNORE)
    shifted = labels[..., 1:].contiguous()
    return F.cross_entropy(logits.float().view(-1, V), shifted.view(-1).to(logits.device), ignore_index=IGNORE)


def sliced(logits: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1))


SHIFTED: dict[str, Callable[..., Tensor]] = {
    "hugging face": hugging_face,
    "sliced": sliced,
    "sliced with an ellipsis": lambda z, x, y: F.cross_entropy(
        z[..., :-1, :].contiguous().view(-1, V), y[..., 1:].contiguous().view(-1)
    ),
    "flattened": lambda z, x, y: F.cross_entropy(z[:, :-1].flatten(0, 1), y[:, 1:].flatten()),
    "module": lambda z, x, y: nn.CrossEntropyLoss()(z[:, :-1, :].reshape(-1, V), y[:, 1:].reshape(-1)),
    "sum over a count": lambda z, x, y: (
        F.cross_entropy(z[:, :-1].reshape(-1, V), y[:, 1:].reshape(-1), reduction="sum") / 3
    ),
    "the last of a longer slice": lambda z, x, y: F.cross_entropy(z[:, 1:-1].reshape(-1, V), y[:, 2:].reshape(-1)),
}
UNSHIFTED: dict[str, Callable[..., Tensor]] = {
    "whole": lambda z, x, y: F.cross_entropy(z.view(-1, V), y.view(-1)),
    "flattened": lambda z, x, y: F.cross_entropy(z.flatten(0, 1), y.flatten()),
    "a prefix left out": lambda z, x, y: F.cross_entropy(z[:, 2:].reshape(-1, V), y[:, 2:].reshape(-1)),
}


@pytest.mark.parametrize("name", SHIFTED)
def test_causal_loss(name: str) -> None:
    captured, outcome = trace(SHIFTED[name])
    assert not outcome.rejections
    roles = captured.ctx.facts.roles
    assert roles == TokenRoles("cross_entropy", (("l_inputs_1_", 1),), IGNORE, None, roles.loss)
    assert len(roles.loss) == 1


@pytest.mark.parametrize("name", UNSHIFTED)
def test_labels_shifted_beforehand(name: str) -> None:
    captured, _ = trace(UNSHIFTED[name])
    assert captured.ctx.facts.roles.labels == (("l_inputs_1_", 0),)


def test_labels_that_are_the_ids() -> None:
    ids, _ = tokens()
    captured, _ = trace(sliced, ids, ids)
    assert captured.ctx.facts.roles.labels == (("l_inputs_0_", 1),)


@pytest.mark.parametrize("ignore", [0, -1])
def test_another_ignore_index(ignore: int) -> None:
    captured, _ = trace(
        lambda z, x, y: F.cross_entropy(z[:, :-1].reshape(-1, V), y[:, 1:].reshape(-1), ignore_index=ignore)
    )
    assert captured.ctx.facts.roles.ignore_index == ignore


@pytest.mark.parametrize("value", [None, 0, -1])
def test_padded_with_another_ignore_index(value: int | None) -> None:
    """A pad without a value is one with 0."""
    captured, outcome = trace(
        lambda z, x, y: F.cross_entropy(
            z.view(-1, V), F.pad(input=y, pad=(0, 1), value=value)[:, 1:].reshape(-1), ignore_index=value or 0
        )
    )
    assert not outcome.rejections and captured.ctx.facts.roles.labels == (("l_inputs_1_", 1),)


def two(z: Tensor, x: Tensor, y: Tensor, second: Tensor) -> Tensor:
    return sliced(z, x, y) + F.cross_entropy(z.view(-1, V), second.view(-1))


def test_two_losses() -> None:
    captured, _ = trace(two, *tokens(), tokens(seed=1)[1])
    assert captured.ctx.facts.roles.labels == (("l_inputs_1_", 1), ("l_inputs_2_", 0))
    assert len(captured.ctx.facts.roles.loss) == 2


def test_two_losses_of_one_label_tensor_and_two_shifts() -> None:
    """Next-token and token-after-next share labels; a row that only the second loss reads is an output token too."""
    captured, _ = trace(lambda z, x, y: sliced(z, x, y) + F.cross_entropy(z.view(-1, V), y.view(-1)))
    assert captured.ctx.facts.roles is not None
    assert set(captured.ctx.facts.roles.labels) == {("l_inputs_1_", 1), ("l_inputs_1_", 0)}


@pytest.mark.parametrize("how", ["masked_fill", "where"])
def test_labels_made_of_inputs_are_hoisted(how: str) -> None:
    def loss(z: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        y = x.masked_fill(mask == 0, IGNORE) if how == "masked_fill" else torch.where(mask != 0, x, IGNORE)
        return sliced(z, x, y)

    captured, outcome = trace(loss)
    assert not outcome.rejections
    ((name, shift),) = captured.ctx.facts.roles.labels
    assert (shift == 1 and how in name) or name == "y"


def test_labels_compared_with_ignore_index() -> None:
    """A loss that is no cross-entropy still says which labels it ignores."""

    def loss(z: Tensor, x: Tensor, y: Tensor) -> Tensor:
        y = y[:, 1:]
        picked = z[:, :-1].log_softmax(-1).gather(-1, y.clamp(min=0)[..., None])[..., 0]
        return -(picked * (y != IGNORE)).sum()

    captured, outcome = trace(loss)
    assert not outcome.rejections
    assert captured.ctx.facts.roles == TokenRoles("labels", (("l_inputs_1_", 1),), IGNORE, None)


def test_comparison_with_another_number_says_nothing() -> None:
    captured, outcome = trace(lambda z, x, y: (z.sum(-1) * (y != -1)).sum())
    assert captured.ctx.facts.roles is None
    assert "open `token_roles(labels=...)`" in rejections(outcome)[0]


def test_no_loss() -> None:
    captured, outcome = trace(lambda z, x: z.sum(), tokens()[0])
    assert captured.ctx.facts.roles is None
    assert len(outcome.rejections) == 1


@pytest.mark.parametrize(
    ("make", "is_cut"),
    [
        (lambda x: x.requires_grad_(), True),
        (lambda x: x.requires_grad_() * 2, False),  # behind trained layers: any graph break
        (lambda x: x, False),
    ],
)
def test_a_graph_that_is_cut_behind_a_hooked_embedding(make: Callable[[Tensor], Tensor], is_cut: bool) -> None:
    captured = capture(lambda x: x.sum(), make(normal(2, 3, 4)))
    outcome = run_passes(captured, *PASSES)["trace_roles"]
    (reason,) = rejections(outcome)
    assert ("disable_input_require_grads" in reason) == is_cut
    assert "open `token_roles(labels=...)`" in reason


def test_given_roles_come_first() -> None:
    captured = capture(Model(sliced), *tokens())
    captured.ctx.env = replace(captured.ctx.env, roles_given=True)
    run_passes(captured, *PASSES)
    assert captured.ctx.facts.roles.origin == "given" and captured.ctx.facts.roles.labels == ()


INDEX = torch.tensor([0, 2])
DECLINED: dict[str, tuple[Callable[..., Tensor], str]] = {
    "probabilities": (
        lambda z, x, y: F.cross_entropy(z[:, :-1].reshape(-1, V), z[:, 1:].detach().softmax(-1).reshape(-1, V)),
        "the loss has class probabilities as its target",
    ),
    "target from activations": (
        lambda z, x, y: F.cross_entropy(z.view(-1, V), z.detach().argmax(-1).view(-1)),
        "is computed from activations: it is not known before the blocks",
    ),
    "target without sequences": (
        lambda z, x, y: F.cross_entropy(z.view(-1, V), torch.zeros(12, dtype=torch.long)),
        "which is not an integer tensor (batch, tokens)",
    ),
    "two tokens ahead": (
        lambda z, x, y: F.cross_entropy(z[:, :-2].reshape(-1, V), y[:, 2:].reshape(-1)),
        "a row of the loss reads neither its own token's label nor the next one's",
    ),
    "flattened, then shifted": (
        lambda z, x, y: F.cross_entropy(z.view(-1, V)[:-1], y.view(-1)[1:]),
        "a row of the loss reads neither its own token's label nor the next one's",
    ),
    "rows in another order": (
        lambda z, x, y: F.cross_entropy(z.transpose(0, 1).reshape(-1, V), y.reshape(-1)),
        "the rows of the logits cannot be followed through transpose",
    ),
    "classes in the middle": (
        lambda z, x, y: F.cross_entropy(z.transpose(1, 2), y),
        "the classes of the loss are not its last dimension",
    ),
    "padded with label 0": (
        lambda z, x, y: F.cross_entropy(z.view(-1, V), F.pad(y, (0, 1))[:, 1:].reshape(-1)),
        "the target is padded with label 0, not with ignore_index",
    ),
    "padded with a label that has a loss": (
        lambda z, x, y: F.cross_entropy(z.view(-1, V), F.pad(y, (0, 1), value=0)[:, 1:].reshape(-1)),
        "the target is padded with label 0, not with ignore_index",
    ),
    "padded with what another loss would ignore": (
        lambda z, x, y: F.cross_entropy(
            z.view(-1, V), F.pad(y, (0, 1), value=IGNORE)[:, 1:].reshape(-1), ignore_index=0
        ),
        "the target is padded with label -100, not with ignore_index",
    ),
    "labels picked by a tensor": (
        lambda z, x, y: F.cross_entropy(z[:, :2].reshape(-1, V), y[:, INDEX].reshape(-1)),
        "picks rows by a tensor",
    ),
    "rows picked by a tensor": (
        lambda z, x, y: F.cross_entropy(z[:, INDEX].reshape(-1, V), y[:, :2].reshape(-1)),
        "picks rows by a tensor",
    ),
    "an aten slice": (
        lambda z, x, y: F.cross_entropy(z[:, :-1].reshape(-1, V), torch.ops.aten.slice.Tensor(y, 1, 1).reshape(-1)),
        "positions cannot be followed through slice",
    ),
}


@pytest.mark.parametrize("name", DECLINED)
def test_declines(name: str) -> None:
    loss, reason = DECLINED[name]
    captured, outcome = trace(loss)
    assert captured.ctx.facts.roles is None
    assert len(outcome.rejections) == 1 and reason in rejections(outcome)[0], outcome.rejections


def test_classes_in_the_middle_of_equal_size() -> None:
    """A vocabulary as large as the sequence is long must not be taken for it."""
    ids, labels = tokens(length=V)
    captured, outcome = trace(lambda z, x, y: F.cross_entropy(z.transpose(1, 2)[:, :, :-1], y[:, 1:]), ids, labels)
    assert captured.ctx.facts.roles is None and len(outcome.rejections) == 1


def test_losses_that_ignore_different_labels() -> None:
    captured, outcome = trace(
        lambda z, x, y: sliced(z, x, y) + F.cross_entropy(z.view(-1, V), y.view(-1), ignore_index=0)
    )
    assert captured.ctx.facts.roles is None
    assert rejections(outcome) == ["losses with different ignore_index [-100, 0]"]


def test_a_loss_that_cannot_be_followed_forbids_pruning_for_the_others() -> None:
    captured, outcome = trace(lambda z, x, y: sliced(z, x, y) + DECLINED["probabilities"][0](z, x, y))
    assert captured.ctx.facts.roles is None and len(outcome.rejections) == 1


# --- Padding ----------------------------------------------------------------------------------------------------------


MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "to bool": lambda m: m.to(torch.bool),
    "bool()": lambda m: m.bool(),
    "compared with 0": lambda m: m != 0,
    "compared with 1": lambda m: m == 1,
    "one minus": lambda m: (1.0 - m) > 0,
}


@pytest.mark.parametrize("name", MASKS)
def test_padding_mask(name: str) -> None:
    def loss(z: Tensor, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        return sliced(z * MASKS[name](mask)[..., None], x, y)

    captured, _ = trace(loss, *tokens(), torch.ones(2, 6, dtype=torch.long))
    assert captured.ctx.facts.roles.padding == "l_inputs_2_"


def test_bool_input_is_a_mask() -> None:
    captured, _ = trace(
        lambda z, x, y, m: sliced(z * m[..., None], x, y), *tokens(), torch.ones(2, 6, dtype=torch.bool)
    )
    assert captured.ctx.facts.roles.padding == "l_inputs_2_"


def test_position_ids_are_no_mask() -> None:
    captured, _ = trace(lambda z, x, y, p: sliced(z * p[..., None].cos(), x, y), *tokens(), torch.arange(12).view(2, 6))
    assert captured.ctx.facts.roles is not None and captured.ctx.facts.roles.padding is None


def test_ids_compared_with_the_padding_id_are_no_mask() -> None:
    captured, _ = trace(lambda z, x, y: sliced(z * (x != 0)[..., None], x, y))
    assert captured.ctx.facts.roles is not None and captured.ctx.facts.roles.padding is None


def test_two_candidates_are_none() -> None:
    ones = torch.ones(2, 6, dtype=torch.bool)
    captured, _ = trace(lambda z, x, y, m, n: sliced(z * (m & n)[..., None], x, y), *tokens(), ones, ones.clone())
    assert captured.ctx.facts.roles is not None and captured.ctx.facts.roles.padding is None


# --- Models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", BATCHES)
def test_llama(shape: str) -> None:
    model = tiny_llama(layers=1, attention="eager" if shape == "left" else "sdpa").requires_grad_(False)
    inputs = batch(97, **BATCHES[shape])
    captured = capture(lambda **kwargs: model(**kwargs).loss, **inputs)
    outcome = run_passes(captured, *PASSES)["trace_roles"]
    assert not outcome.rejections
    roles = captured.ctx.facts.roles
    assert roles.origin == "cross_entropy"
    ((name, shift),) = roles.labels
    assert "labels" in name and shift == 1
    assert (roles.padding is not None) == ("attention_mask" in inputs)


def test_dynamic_and_idempotent() -> None:
    ids, labels = tokens(rows=3)
    captured, outcome = trace(hugging_face, ids, labels, dynamic=((ids, 0), (labels, 0), (ids, 1), (labels, 1)))
    first = captured.ctx.facts.roles
    assert first is not None and not outcome.rejections
    run_passes(captured, "trace_roles")
    assert captured.ctx.facts.roles == first
