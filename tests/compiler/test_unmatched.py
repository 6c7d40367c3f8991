"""What is said of frozen layers that no pass speaks of: one small graph for each form."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from graphs import Head, capture, tokens
from sparse_compile import explain
from sparse_compile.compiler import unmatched
from sparse_compile.compiler.runner import run_pipeline
from sparse_compile.compiler.unmatched import RULE, unmatched_layers
from sparse_compile.options.config import SparseLoRAConfig

OPTIONS = ({}, {"disable": ["find_attention"]})
Form = Callable[["Block", Tensor], Tensor]


class Block(nn.Module):
    """Frozen layers without adapters, a trained one at their side, and a form that combines them."""

    def __init__(self, form: Form):
        super().__init__()
        self.q, self.k, self.v, self.o, self.up, self.down = (nn.Linear(8, 8, bias=False) for _ in range(6))
        self.gate = nn.Parameter(torch.ones(8))
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        return x + self.form(self, F.layer_norm(x, (8,)))


def reasons(model: nn.Module, *inputs: Tensor, preset: str = "exact") -> dict[str, str]:
    """Return what is said of each layer of the graph that a model makes, by its name without the path."""
    captured = capture(model, *inputs, config=SparseLoRAConfig(preset=preset))
    result = run_pipeline(captured.gm, captured.ctx)
    found = unmatched_layers(result.canonical.graph, captured.ctx, result.rejections)
    return {each.node.rpartition(".")[2]: each.reason for each in found}


def softmax_over(scores: Callable[[Tensor, Tensor], Tensor]) -> Form:
    return lambda m, x: m.o(scores(m.q(x), m.k(x)).softmax(-1) @ m.v(x))


FORMS: dict[str, tuple[Form, dict[str, str]]] = {
    "a recurrence": (lambda m, x: m.o(m.v(x).cumsum(1)), {"v": "(cumsum), not by softmax", "o": "(cumsum), not by"}),
    "a convolution": (
        lambda m, x: m.o(F.conv1d(m.v(x).mT, torch.ones(8, 1, 3, dtype=x.dtype), padding=1, groups=8).mT),
        {"v": "along the tokens (conv1d)", "o": "along the tokens (conv1d)"},
    ),
    "scores of a form of their own": (
        softmax_over(lambda q, k: torch.maximum(q @ k.mT, q.cos() @ k.mT)),
        dict.fromkeys("qkvo", "scores are made by cos, matmul, maximum"),
    ),
    "a choice of experts": (
        lambda m, x: m.q(x).topk(2).values.sum(-1, keepdim=True) * x,
        {"q": "a choice of experts or of tokens (topk)"},
    ),
    "a cross-attention": (
        lambda m, x: m.o(
            F.scaled_dot_product_attention(
                *(each.unsqueeze(1) for each in (m.q(x), m.k(x.sin()), m.v(x.sin())))
            ).squeeze(1)
        ),
        dict.fromkeys("qkvo", "cross-attention stays dense"),
    ),
    "a learned formula": (
        lambda m, x: m.down(torch.where((h := m.up(x)) > 0, h * m.gate.flip(0), h.exp())),
        dict.fromkeys(("up", "down"), "an elementwise formula with learned parameters"),
    ),
    "a norm in the block": (
        lambda m, x: m.down(F.layer_norm(m.up(x).relu(), (8,), m.gate)),
        dict.fromkeys(("up", "down"), "a norm over its channels (layer_norm)"),
    ),
    "a block that was declined": (
        lambda m, x: (h := m.up(x).relu()) + m.down(h),
        {"up": "feeds a block that was declined: its intermediate h is also read by"},
    ),
    "anything else": (lambda m, x: m.v(x).flip(1), {"v": "its output is read by flip: neither a feed-forward block"}),
    "a bare chain": (
        lambda m, x: m.o(F.layer_norm(m.v(x), (8,))),
        {
            "v": "its output is read by another layer, body.0.o, through nothing",
            "o": "its input is made by nothing but",
        },
    ),
    "a feed-forward block": (lambda m, x: m.down(m.up(x).relu()), {}),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_form_that_no_matcher_looks_for_is_described(name: str) -> None:
    form, expected = FORMS[name]
    # Another block follows, or what the head reads would say something of this one.
    model = Head(Block(form), Block(FORMS["a feed-forward block"][0]))
    found = reasons(model, *tokens())
    assert found.keys() == expected.keys(), found
    for layer, words in expected.items():
        assert words in found[layer], found[layer]


def test_the_head_is_named_where_its_rows_are_not_selected() -> None:
    model = Head(Block(lambda m, x: m.down(m.up(x).relu())))
    assert "head" not in reasons(model, *tokens())
    assert reasons(model, *tokens(), preset="none") == {
        "head": "it is the head, no other layer reads its output: all rows are computed where this pass does not apply"
    }


ENDS: dict[str, tuple[Form, str]] = {
    "at once": (lambda m, x: m.v(x), "the graph ends there (a graph break), or it is the head"),
    "within the block": (lambda m, x: F.gelu(m.v(x)), "is read by gelu, but no other layer of this graph"),
    "behind a recurrence": (lambda m, x: m.v(x.cumsum(1)), "its input is made by a recurrence"),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_layer_behind_which_the_graph_ends_is_not_called_the_head(name: str) -> None:
    form, words = ENDS[name]
    assert words in reasons(Block(form).requires_grad_(False), torch.ones(2, 5, 8))["v"]


def test_a_weight_that_is_computed_is_named() -> None:
    model = Head(Block(lambda m, x: F.linear(x, m.v.weight / m.v.weight.norm())))
    assert reasons(model, *tokens())["v"].startswith("its weight is computed in the graph from a stored one")


def test_what_is_no_product_over_tokens_is_left_alone() -> None:
    model = Head(Block(lambda m, x: x * m.v(torch.ones(8, dtype=x.dtype))))
    assert reasons(model, *tokens()) == {}


def test_nothing_is_named_where_a_finder_was_left_out() -> None:
    model = Head(Block(FORMS["a recurrence"][0]), Block(FORMS["a feed-forward block"][0]))
    rules = [{each.rule for each in explain(model, *tokens(), config=options).rejections} for options in OPTIONS]
    assert [RULE in each for each in rules] == [True, False]


def test_a_failure_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("lost")

    monkeypatch.setattr(unmatched, "unmatched_layers", broken)
    model = Head(Block(FORMS["a recurrence"][0]))
    with pytest.warns(UserWarning, match="layers in no site were not named. KeyError: 'lost'"):
        explain(model, *tokens())


def test_the_report_names_each_form_once() -> None:
    model = Head(*(Block(FORMS["a recurrence"][0]) for _ in range(5)), Block(FORMS["a feed-forward block"][0]))
    text = str(explain(model, *tokens()))
    (line,) = (line for line in text.splitlines() if "its output is read by a recurrence" in line)
    assert line.endswith("(body.0-4.v)")
