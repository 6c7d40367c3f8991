"""Roles, scores and choices of the reference, checked by loops over single numbers."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from models import normal, random_mask
from sparse_compile.reference import (
    expand_kv_channels,
    ffn_scores,
    kept_count,
    low_rank_factors,
    mean_over_context,
    output_mask_from_labels,
    predictor_rows,
    query_key_scores,
    scored_positions,
    top_channels,
    value_scores,
)


def close(actual: Tensor, expected: Tensor, bound: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=bound, atol=bound)


# --- Roles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.parametrize("ignore_index", [-100, 0])
def test_output_mask_by_loop(length: int, ignore_index: int) -> None:
    labels = torch.randint(0, 2, (5, length), generator=torch.Generator().manual_seed(3))
    labels[labels == 0] = ignore_index
    before = labels.clone()
    mask = output_mask_from_labels(labels, ignore_index)
    for b in range(5):
        for t in range(length):
            own = labels[b, t] != ignore_index
            target = t + 1 < length and labels[b, t + 1] != ignore_index
            assert bool(mask[b, t]) == bool(own or target)
    assert torch.equal(labels, before)


def test_last_prompt_position_is_output_and_padding_is_context() -> None:
    labels = torch.tensor([[-100, -100, 5, 6, -100]])
    assert output_mask_from_labels(labels).tolist() == [[False, True, True, True, False]]
    scored = scored_positions(output_mask_from_labels(labels), torch.tensor([[1, 1, 1, 1, 0]]))
    assert scored.tolist() == [[True, False, False, False, False]]


# --- Predictor --------------------------------------------------------------------------------------------------------


def test_low_rank_factors_are_balanced_and_optimal() -> None:
    weight = normal(7, 12)
    a, b = low_rank_factors(weight, 3)
    assert a.shape == (12, 3)
    assert b.shape == (3, 7)
    close(a.norm(dim=0), b.norm(dim=1))
    dropped = torch.linalg.svdvals(weight)[3:]
    close((weight.T - a @ b).norm(), dropped.norm())
    exact = normal(7, 2) @ normal(2, 12)
    a, b = low_rank_factors(exact, 3)
    close(a @ b, exact.T)


def test_mean_over_context_by_loop() -> None:
    x, scored = normal(4, 6, 3), random_mask(4, 6)
    scored[2] = False
    x[~scored] = math.nan
    mean = mean_over_context(x, scored)
    for b in range(4):
        rows = [x[b, t] for t in range(6) if scored[b, t]]
        close(mean[b], sum(rows) / len(rows) if rows else torch.zeros(3, dtype=torch.float64))
    # 600 times 300 is beyond fp16's largest number.
    assert mean_over_context(torch.full((1, 600, 1), 300.0).half(), torch.ones(1, 600, dtype=torch.bool)).item() == 300


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8, 100])
@pytest.mark.parametrize("count", [0, 1, 4, 7, 8])
def test_evenly_spaced_rows(tokens: int, count: int) -> None:
    scored = torch.tensor([[False, True] * count + [False]])
    x = torch.arange(2 * count + 1, dtype=torch.float64)[None, :, None]
    ranks = [(int(value) - 1) // 2 for value in predictor_rows(x, scored, tokens)[:, 0]]
    assert len(ranks) == min(tokens, count)
    if count:
        gaps = [after - before for before, after in pairwise([*ranks, count])]
        assert ranks[0] == 0
        assert min(gaps) >= 1
        assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("tokens", [0, -3, 2.5, True, "some"])
def test_wrong_predictor_tokens(tokens: object) -> None:
    with pytest.raises(ValueError, match="predictor_tokens"):
        predictor_rows(normal(1, 2, 3), torch.ones(1, 2, dtype=torch.bool), tokens)  # type: ignore[arg-type]


def rows_by_loop(x: Tensor, scored: Tensor, tokens: str | int) -> list[Tensor]:
    rows: list[Tensor] = []
    for sequence, keep in zip(x, scored, strict=True):
        context = [row for row, kept in zip(sequence, keep, strict=True) if kept]
        if tokens == "mean":
            rows += [sum(context) / len(context)] if context else []
        elif tokens == "all":
            rows += context
        else:
            rows += [
                context[r] for r in range(len(context)) if any(i * len(context) // tokens == r for i in range(tokens))
            ]
    return rows


def norms_by_loop(rows: list[Tensor]) -> Tensor:
    total = torch.zeros_like(rows[0])
    for row in rows:
        total += row**2
    return total.sqrt()


@pytest.mark.parametrize("tokens", ["mean", "all", 2])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("oracle", [True, False])
def test_ffn_scores_by_loop(tokens: str | int, gated: bool, oracle: bool) -> None:
    x, scored = normal(3, 7, 6), random_mask(3, 7)
    scored[1] = False  # a sequence without context: sigmoid(0) is not zero, so it must be left out, not zeroed
    x[~scored] = math.nan
    weights = [normal(10, 6, seed=i) for i in range(2 if gated else 1)]
    factors = [low_rank_factors(weight, 3) for weight in weights]
    region = (lambda g, u: torch.sigmoid(g) * u) if gated else torch.sigmoid
    projections = [nn.Linear(6, 10, bias=False, dtype=torch.float64) for _ in weights] if oracle else factors
    matrices = [a @ b for a, b in factors]
    if oracle:
        for layer, weight in zip(projections, weights, strict=True):
            layer.weight.data = weight
        matrices = [weight.T for weight in weights]
    scores = ffn_scores(x, scored, projections, region, predictor_tokens=tokens)
    expected = norms_by_loop([region(*(row @ m for m in matrices)) for row in rows_by_loop(x, scored, tokens)])
    close(scores, expected)
    assert not scores.requires_grad


@pytest.mark.parametrize("tokens", ["mean", "all", 3])
@pytest.mark.parametrize(("kv_heads", "groups"), [(3, 1), (2, 3)])
def test_attention_scores_by_loop(tokens: str | int, kv_heads: int, groups: int) -> None:
    head_dim, hidden = 4, 6
    x, scored = normal(3, 7, hidden), random_mask(3, 7)
    q, k, v = (
        low_rank_factors(normal(heads * head_dim, hidden, seed=i), 3)
        for i, heads in enumerate((kv_heads * groups, kv_heads, kv_heads))
    )
    rows = rows_by_loop(x, scored, tokens)
    q_norm, k_norm, v_norm = (norms_by_loop([row @ a @ b for row in rows]) for a, b in (q, k, v))
    close(value_scores(x, scored, v, predictor_tokens=tokens), v_norm)
    scores = query_key_scores(x, scored, q, k, head_dim=head_dim, groups=groups, predictor_tokens=tokens)
    for query_head in range(0, kv_heads * groups, groups):
        for d in range(head_dim):
            mine = sum(q_norm[(query_head + g) * head_dim + d] for g in range(groups)) / groups
            channel = query_head // groups * head_dim + d
            close(scores[channel], k_norm[channel] * mine)


def test_scores_without_any_context_are_zero() -> None:
    x, nothing = normal(2, 3, 6), torch.zeros(2, 3, dtype=torch.bool)
    factors = low_rank_factors(normal(8, 6), 3)
    for tokens in ("mean", "all", 2):
        assert not ffn_scores(x, nothing, [factors], torch.sigmoid, predictor_tokens=tokens).any()
        assert not value_scores(x, nothing, factors, predictor_tokens=tokens).any()
        assert not query_key_scores(x, nothing, factors, factors, head_dim=4, predictor_tokens=tokens).any()


def test_half_precision_scores_do_not_overflow() -> None:
    x = torch.full((1, 4, 2), 300.0, dtype=torch.float16)
    factors = (torch.eye(2, dtype=torch.float16), torch.eye(2, dtype=torch.float16))
    scores = value_scores(x, torch.ones(1, 4, dtype=torch.bool), factors)
    assert scores.dtype == torch.float32
    assert scores.tolist() == [600.0, 600.0]


# --- Choice of channels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "sparsity", "kept"),
    [
        (100, 0.29, 71),
        (3584, 0.99, 36),
        (14336, 0.97, 431),
        (10, 0.0, 10),
        (3, 0.99, 1),
        (1, 0.5, 1),
        (1000, 0.001, 999),
    ],
)
def test_kept_count(channels: int, sparsity: float, kept: int) -> None:
    assert kept_count(channels, sparsity) == kept


def test_top_channels_keeps_the_lowest_of_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    for k in (1, 2, 7, 40):
        scores = torch.randint(0, 4, (40,), generator=generator).double()
        best = sorted(range(40), key=lambda i: (-float(scores[i]), i))[:k]
        assert top_channels(scores, k).tolist() == sorted(best)
    assert top_channels(torch.ones(1000), 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("fault", [0.0, math.nan, math.inf])
def test_top_channels_without_information_keeps_the_lowest(fault: float) -> None:
    scores = torch.zeros(6) if fault == 0.0 else torch.tensor([1.0, 2.0, 3.0, fault, 5.0, 6.0])
    assert top_channels(scores, 2).tolist() == [0, 1]


@pytest.mark.parametrize("k", [0, -1, 7])
def test_top_channels_refuses_impossible_counts(k: int) -> None:
    with pytest.raises(ValueError, match="of 6 channels"):
        top_channels(torch.ones(6), k)


@pytest.mark.parametrize(("kv_heads", "groups", "head_dim"), [(1, 1, 4), (3, 1, 4), (2, 3, 5), (1, 4, 2)])
def test_expand_kv_channels_by_loop(kv_heads: int, groups: int, head_dim: int) -> None:
    """Fault 2 of the published code: query channels paired with the wrong kv head."""
    width = kv_heads * head_dim
    kept = torch.randperm(width, generator=torch.Generator().manual_seed(1))[: width // 2 + 1]
    expected = []
    for query_head in range(kv_heads * groups):
        for d in range(head_dim):
            if query_head // groups * head_dim + d in kept.tolist():
                expected.append(query_head * head_dim + d)  # noqa: PERF401 - a loop is the point
    assert expand_kv_channels(kept, head_dim, groups).tolist() == expected
