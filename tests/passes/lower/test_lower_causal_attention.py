"""Attention under a mask that forbids every later key computes fewer scores, and the same result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from graphs import (
    ANALYSES,
    aot_eager,
    assert_golden,
    capture,
    gradients_of,
    rejections,
    render,
    run_passes,
    run_rewritten,
    targets,
)
from models import batch, normal, tiny_llama, with_lora
from sparse_compile.compiler.runner import run_pipeline
from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.passes.lower import lower_causal_attention
from tolerances import assert_close_rms

PASS = "lower_causal_attention"
LENGTH = 130
"""Two blocks of queries, of 65 each."""

Mask = Callable[[int, Tensor], Tensor]


@pytest.fixture(autouse=True)
def short_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lower_causal_attention, "SHORTEST", 8)


class Attention(nn.Module):
    """Attention of fp64 operands under a mask made from the length and (B, S) marks of tokens that count."""

    def __init__(self, mask: Mask, **options: Any) -> None:
        super().__init__()
        self.mask, self.options = mask, options

    def forward(self, q: Tensor, k: Tensor, v: Tensor, counts: Tensor) -> Tensor:
        mask = self.mask(q.shape[2], counts)
        return F.scaled_dot_product_attention(q, k, v, mask, **self.options).sin().sum()


def operands(length: int = LENGTH, *, kv_heads: int = 4) -> tuple[Tensor, ...]:
    """Return q, k, v laid out as projections give them, and marks: the first tokens of a row are padding."""
    heads = (4, kv_heads, kv_heads)
    q, k, v = (normal(2, length, h, 8, seed=i).transpose(1, 2).requires_grad_() for i, h in enumerate(heads))
    counts = torch.ones(2, length, dtype=torch.bool)
    counts[0, : length // 3] = False
    return q, k, v, counts


def positions(length: int) -> tuple[Tensor, Tensor]:
    return torch.arange(length)[None, None, :, None], torch.arange(length)[None, None, None, :]


def causal(length: int, _: Tensor) -> Tensor:
    q, k = positions(length)
    return k <= q


def padded(length: int, counts: Tensor) -> Tensor:
    q, k = positions(length)
    return (q >= k) & counts[:, None, None, :]


def windowed(length: int, _: Tensor) -> Tensor:
    q, k = positions(length)
    return (k <= q) & (k > q - 16)


def lower_triangle(length: int, counts: Tensor) -> Tensor:
    return torch.tril(torch.ones(length, length, dtype=torch.bool))[None, None] & counts[:, None, None, :]


def looked_up(length: int, counts: Tensor) -> Tensor:
    """As transformers spells it where it looks for packed sequences."""
    table = torch.arange(length).unsqueeze(0).expand(2, -1)
    rows, (q, k) = torch.arange(2)[:, None, None, None], positions(length)
    return (table[rows, k] <= table[rows, q]).expand(2, -1, length, length)


def by_name(length: int, _: Tensor) -> Tensor:
    places = torch.arange(length)
    keys, queries = (torch.unsqueeze(input=places, dim=dim) for dim in (0, 1))
    return torch.unsqueeze(input=torch.clone(input=keys <= queries), dim=0)[None]


CAUSAL: dict[str, Mask] = {
    "causal": causal, "padded": padded, "windowed": windowed, "triangle": lower_triangle, "looked up": looked_up,
    "by name": by_name,
}  # fmt: skip


@pytest.mark.parametrize("name", CAUSAL)
def test_result_and_gradients_are_those_of_eager(name: str) -> None:
    module, arguments = Attention(CAUSAL[name]), operands()
    ran = run_rewritten(module, *arguments, only=("canonicalize_linears", PASS), compiler=aot_eager)
    assert ran.result.exact is not None and "causal_attention" in targets(ran.result.exact)
    expected = module(*arguments)
    assert_close_rms(ran.value, expected, name="value")
    found, wanted = (gradients_of(value, module, *arguments[:3]) for value in (ran.value, expected))
    for each in wanted:
        assert_close_rms(found[each], wanted[each], name=each)


def test_the_simple_case() -> None:
    module = Attention(causal)
    captured = capture(module, *operands())
    outcome = run_passes(captured, "canonicalize_linears", PASS)[PASS]
    assert outcome.stats == {"cpu_blocks": 1} and not outcome.rejections
    assert_golden(PASS, render(captured))
    before = render(captured)
    assert not run_passes(captured, PASS)[PASS].changed and render(captured) == before


def test_operands_by_name() -> None:
    class Named(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, counts: Tensor) -> Tensor:
            mask = causal(q.shape[2], counts)
            return F.scaled_dot_product_attention(attn_mask=mask, value=v, key=k, query=q)

    arguments = operands()
    ran = run_rewritten(Named(), *arguments, only=("canonicalize_linears", PASS))
    assert ran.result.exact is not None and "causal_attention" in targets(ran.result.exact)
    assert_close_rms(ran.value, F.scaled_dot_product_attention(*arguments[:3], causal(LENGTH, arguments[3])))


def test_a_symbolic_length() -> None:
    q, *_, counts = operands()
    attention = Attention(padded)
    captured = capture(
        lambda q, counts: attention(q, q.sin(), q.cos(), counts), q, counts, dynamic=((q, 2), (counts, 1))
    )
    assert run_passes(captured, "canonicalize_linears", PASS)[PASS].stats == {"cpu_blocks": 1}


def test_one_mask_is_converted_once() -> None:
    class Twice(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, counts: Tensor) -> Tensor:
            mask = padded(q.shape[2], counts)
            return F.scaled_dot_product_attention(F.scaled_dot_product_attention(q, k, v, mask), k, v, mask, scale=0.3)

    captured = capture(Twice(), *operands())
    assert run_passes(captured, "canonicalize_linears", PASS)[PASS].stats == {"cpu_blocks": 2}
    assert targets(captured.gm).count("masked_fill") == 1


def later_keys(length: int, _: Tensor) -> Tensor:
    q, k = positions(length)
    return k >= q


def either(length: int, counts: Tensor) -> Tensor:
    return causal(length, counts) | counts[:, None, None, :]


def one_key(length: int, _: Tensor) -> Tensor:
    """The first key for all: the comparison is broadcast to the other keys."""
    return (torch.arange(1)[None, None, None, :] <= torch.arange(length)[None, None, :, None]).expand(2, 1, -1, length)


def shifted(length: int, _: Tensor) -> Tensor:
    q, k = positions(length)
    return k <= q + 1


def stepped(length: int, _: Tensor) -> Tensor:
    return torch.arange(length)[None, None, None, :] <= torch.arange(0, 2 * length, 2)[None, None, :, None]


def written(length: int, counts: Tensor) -> Tensor:
    mask = causal(length, counts).expand(2, 1, length, length).clone()
    mask[:, :, :, 0] = True
    return mask


def upper_triangle(length: int, counts: Tensor) -> Tensor:
    return torch.tril(torch.ones(length, length, dtype=torch.bool), diagonal=3)[None, None].expand(2, 1, -1, -1)


def given(length: int, counts: Tensor) -> Tensor:
    return counts[:, None, None, :].expand(2, 1, length, length)


def rising(length: int, counts: Tensor) -> Tensor:
    """Positions that depend on data need not rise."""
    order = counts.cumsum(1)
    return order[:, None, None, :] <= order[:, None, :, None]


def filled(length: int, _: Tensor) -> Tensor:
    """No tensor is an operand of what makes it."""
    return torch.full(size=(2, 1, length, length), fill_value=True)


def compared_with_filled(length: int, _: Tensor) -> Tensor:
    return torch.full(size=(1, 1, 1, length), fill_value=0) <= torch.arange(length)[None, None, :, None]


NOT_CAUSAL: dict[str, Mask] = {
    "later keys": later_keys, "either": either, "one key": one_key, "shifted": shifted, "stepped": stepped,
    "written to": written, "diagonal": upper_triangle, "given": given, "of data": rising,
    "filled": filled, "compared with filled": compared_with_filled,
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_a_mask_that_may_allow_a_later_key_is_declined(name: str) -> None:
    captured = capture(Attention(NOT_CAUSAL[name]), *operands())
    outcome = run_passes(captured, "canonicalize_linears", PASS)[PASS]
    assert not outcome.changed and rejections(outcome) == ["nothing shows that its mask forbids every later key"]


def additive(length: int, counts: Tensor) -> Tensor:
    return torch.zeros(length, length, dtype=torch.float64).masked_fill(
        causal(length, counts).logical_not(), -torch.inf
    )


@pytest.mark.parametrize(
    ("module", "arguments", "reason"),
    [
        (Attention(causal, dropout_p=0.1), operands(), "its weights are dropped out"),
        (Attention(lambda *_: None), operands(), "it has no mask"),  # type: ignore[arg-type, return-value]
        (Attention(additive), operands(), "its mask is not one of allowed keys"),
        (Attention(lambda n, _: torch.ones(n, n).tril().bool()), operands(), "its mask is not of \\(batch"),
        (Attention(causal, enable_gqa=True), operands(kv_heads=2), "differ in their numbers of tokens, heads"),
        (Attention(causal), operands(6), "fewer than 8 tokens"),
    ],
    ids=["dropout", "no mask", "additive", "matrix", "grouped", "short"],
)
def test_near_misses_are_declined_with_the_reason(module: nn.Module, arguments: Any, reason: str) -> None:
    captured = capture(module, *arguments)
    outcome = run_passes(captured, "canonicalize_linears", PASS)[PASS]
    (found,) = rejections(outcome)
    assert not outcome.changed
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(found)


def test_autocast_is_declined() -> None:
    arguments = tuple(each.detach().float() for each in operands()[:3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        captured = capture(Attention(causal), *arguments, operands()[3])
        outcome = run_passes(captured, "canonicalize_linears", PASS)[PASS]
    assert not outcome.changed and "autocast casts" in rejections(outcome)[0]


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_masks_of_transformers_are_recognised(padding: str | None) -> None:
    captured = capture(with_lora(tiny_llama()), **batch(97, padding=padding))
    outcome = run_passes(captured, *ANALYSES, PASS)[PASS]
    assert outcome.changed and not outcome.rejections


def test_packed_sequences_are_declined() -> None:
    """Their positions are an input of the graph, which nothing says of that they rise."""
    captured = capture(with_lora(tiny_llama()), **batch(97, packed=True))
    outcome = run_passes(captured, *ANALYSES, PASS)[PASS]
    assert not outcome.changed and set(rejections(outcome)) == {"nothing shows that its mask forbids every later key"}


def test_sparse_sites_go_with_it() -> None:
    config = SparseLoRAConfig(layer_sparsity={"self_attn": 0.5, "mlp": 0.5})
    captured = capture(with_lora(tiny_llama()), config=config, **batch(97, padding="left"))
    result = run_pipeline(captured.gm, captured.ctx)
    assert result.sparse is not None and {"causal_attention", "gathered_linear"} <= set(targets(result.sparse))
