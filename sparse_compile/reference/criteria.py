"""Which tokens are output, how channels are scored, and which of them are kept.

Source: SparseLoRA (arXiv 2506.16500): its sparsity criteria, its SVD estimator, its split of context and output tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Projection: TypeAlias = tuple[Tensor, Tensor] | Callable[[Tensor], Tensor]
"""What a score reads: factors `(A, B)` of the weight alone (the predictor), or a function of (M, in) rows: the true
layer (the oracle criterion), or `lambda rows: rows @ a @ b + bias`."""

PredictorTokens: TypeAlias = Literal["mean", "all"] | int
"""Which context tokens a score reads: one mean per sequence, all, or that many evenly spaced ones per sequence."""


# --- Roles ------------------------------------------------------------------------------------------------------------


def output_mask_from_labels(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Mark the output tokens: positions that carry a label, or predict one.

    Position t predicts the token at t + 1: the last prompt position is output. All others, padding too, are context.

    Args:
        labels: Integer (B, S), unshifted, as Hugging Face models take them.
        ignore_index: The label that the loss ignores.

    Returns:
        Bool (B, S), true at output tokens.

    Source: SparseLoRA, token sensitivity.
    """
    counted = labels != ignore_index
    output = counted.clone()
    output[:, :-1] |= counted[:, 1:]
    return output


def scored_positions(output_mask: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Mark the positions that take part in a channel score, (B, S): context tokens that are not padding.

    Args:
        output_mask: Bool (B, S), true at output tokens.
        attention_mask: (B, S), zero at padding; None where there is none.
    """
    scored = ~output_mask
    return scored if attention_mask is None else scored & (attention_mask != 0)


# --- Predictor --------------------------------------------------------------------------------------------------------


def low_rank_factors(weight: Tensor, rank: int = 8) -> tuple[Tensor, Tensor]:
    """Factor the transpose of a frozen weight as A B by a full SVD, the best approximation of its rank.

    Args:
        weight: (out, in), as `nn.Linear` stores it.
        rank: Number of singular values kept, at most min(out, in).

    Returns:
        A = U_r sqrt(S_r), (in, rank), and B = sqrt(S_r) V_r, (rank, out), in the weight's dtype.

    Source: SparseLoRA, SVD sparsity estimator.
    """
    u, s, vh = torch.linalg.svd(weight.detach().T, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


def mean_over_context(x: Tensor, scored: Tensor) -> Tensor:
    """Average the scored positions of each sequence.

    Args:
        x: (B, S, C). Values at positions that are not scored are never read: a NaN there does no harm.
        scored: Bool (B, S).

    Returns:
        (B, C), summed in fp32 or wider, in the dtype of x; zero for a sequence without a scored position.
    """
    wide = torch.where(scored[..., None], x, 0).to(_score_dtype(x))
    count = scored.sum(dim=1, keepdim=True).clamp(min=1)
    return (wide.sum(dim=1) / count).to(x.dtype)


def predictor_rows(x: Tensor, scored: Tensor, tokens: PredictorTokens) -> Tensor:
    """Gather the rows that a score reads.

    An integer n reads, of the c scored positions of a sequence, those of rank floor(i * c / n) for i in 0..n-1, each
    once: evenly spaced from the first on, and all of them where c <= n.

    Args:
        x: (B, S, C), the input of a block's projections.
        scored: Bool (B, S).
        tokens: `"mean"` (one averaged row per sequence that has a scored position), a positive integer, or `"all"`.

    Returns:
        (M, C); M may be 0. A sequence without a scored position adds no row.

    Raises:
        ValueError: If `tokens` is none of the above.
    """
    if tokens == "mean":
        return mean_over_context(x, scored)[scored.any(dim=1)]
    if tokens == "all":
        return x[scored]
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f'predictor_tokens must be "mean", "all" or a positive integer, not {tokens!r}')
    rows = []
    for sequence, keep in zip(x, scored, strict=True):
        context = sequence[keep]
        count = len(context)
        ranks = sorted({i * count // tokens for i in range(tokens)}) if count else []
        rows.append(context[ranks])
    return torch.cat(rows)


# --- Channel scores ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def ffn_scores(
    x: Tensor,
    scored: Tensor,
    projections: Sequence[Projection],
    region: Callable[..., Tensor],
    *,
    predictor_tokens: PredictorTokens = 16,
) -> Tensor:
    """Score the intermediate channels of an FFN: score_j = ||h_j||_2 over the context tokens.

    Args:
        x: (B, S, hidden), the input of the block's in-projections.
        scored: Bool (B, S), see `scored_positions`.
        projections: The in-projections in the order `region` takes them: (gate, up), or one when ungated.
        region: The elementwise region between in- and out-projection: `lambda g, u: silu(g) * u`, or `gelu`.
        predictor_tokens: Which context tokens are read. `"all"` is the paper's formula; `"mean"`, the published code's.

    Returns:
        (ffn,), fp32 or wider, no gradient; zero without a scored position.

    Source: SparseLoRA, L2-norm criterion for the FFN.
    """
    rows = predictor_rows(x, scored, predictor_tokens)
    return _norms(region(*(_project(rows, projection) for projection in projections)))


@torch.no_grad()
def value_scores(x: Tensor, scored: Tensor, v: Projection, *, predictor_tokens: PredictorTokens = "all") -> Tensor:
    """Score the kv channels for V and O: score_c = ||v_c||_2 over the context tokens.

    Args:
        x: (B, S, hidden), the input of the attention block's projections.
        scored: Bool (B, S), see `scored_positions`.
        v: The value projection.
        predictor_tokens: Which context tokens are read.

    Returns:
        (n_kv * head_dim,), fp32 or wider, no gradient.

    Source: SparseLoRA, L2-norm criterion for V and O.
    """
    return _norms(_project(predictor_rows(x, scored, predictor_tokens), v))


@torch.no_grad()
def query_key_scores(
    x: Tensor,
    scored: Tensor,
    q: Projection,
    k: Projection,
    *,
    head_dim: int,
    groups: int = 1,
    predictor_tokens: PredictorTokens = "all",
) -> Tensor:
    """Score the kv channels for Q and K: the product of the two channels' norms.

    For kv channel (head j, channel d) the score is ||k_{j,d}|| * mean over g < G of ||q_{j*G+g,d}||: what is averaged
    are the norms of the G query channels that meet this key channel, all before the rotary embedding.

    Args:
        x: (B, S, hidden), the input of the attention block's projections.
        scored: Bool (B, S), see `scored_positions`.
        q: The query projection, n_kv * groups * head_dim wide.
        k: The key projection, n_kv * head_dim wide.
        head_dim: Channels per head.
        groups: G, query heads per kv head; 1 for multi-head attention.
        predictor_tokens: Which context tokens are read.

    Returns:
        (n_kv * head_dim,), fp32 or wider, no gradient.

    Source: SparseLoRA, QK-norm criterion; in grouped-query attention, query head h reads kv head h // G.
    """
    rows = predictor_rows(x, scored, predictor_tokens)
    q_norms = _norms(_project(rows, q)).view(-1, groups, head_dim)
    k_norms = _norms(_project(rows, k)).view(-1, head_dim)
    return (k_norms * q_norms.mean(dim=1)).flatten()


def _project(rows: Tensor, projection: Projection) -> Tensor:
    """Apply the low-rank factors, or the layer itself."""
    if not isinstance(projection, tuple):
        return projection(rows)
    a, b = projection
    dtype = torch.promote_types(rows.dtype, a.dtype)
    return rows.to(dtype) @ a.to(dtype) @ b.to(dtype)


def _norms(activations: Tensor) -> Tensor:
    """Take each column's L2 norm over the rows of (M, C); zero where M is 0."""
    return activations.to(_score_dtype(activations)).square().sum(dim=0).sqrt()


def _score_dtype(x: Tensor) -> torch.dtype:
    """Widen half precision: squares of fp16 activations overflow."""
    return torch.promote_types(x.dtype, torch.float32)


# --- Choice of channels -----------------------------------------------------------------------------------------------


def kept_count(channels: int, sparsity: float) -> int:
    """Count the channels kept: max(1, n - floor(n * s)), with n * s in exact decimal arithmetic.

    Binary floats would keep 72 of 100 channels at sparsity 0.29, as 100 * 0.29 is 28.999999999999996.

    Args:
        channels: n: the FFN's width, or n_kv * head_dim.
        sparsity: s, the share of channels dropped, in [0, 1), read as its shortest decimal form.
    """
    return max(1, channels - int(channels * Decimal(str(sparsity))))


def top_channels(scores: Tensor, k: int) -> Tensor:
    """Choose the k channels of highest score; of equal scores, the lowest index.

    A score vector that is all zero or holds a NaN or an infinity says nothing: the lowest k indices are kept.

    Args:
        scores: (n,), not negative.
        k: How many, 1 <= k <= n.

    Returns:
        Int64 (k,), sorted ascending.

    Raises:
        ValueError: If k is out of range.
    """
    if not 1 <= k <= len(scores):
        raise ValueError(f"cannot keep {k} of {len(scores)} channels")
    if not scores.isfinite().all():
        return torch.arange(k, device=scores.device)
    # `topk` leaves the order of ties open; a stable sort keeps the lowest index first, all-zero scores included.
    return scores.sort(descending=True, stable=True).indices[:k].sort().values


def expand_kv_channels(kept: Tensor, head_dim: int, groups: int) -> Tensor:
    """Map kept kv channels to the query channels that meet them, in q_proj's output and in o_proj's input.

    Query head h reads kv head h // G, so kv channel j * head_dim + d stands for (j * G + g) * head_dim + d, g < G.

    Args:
        kept: Int64 (k,), indices in n_kv * head_dim.
        head_dim: Channels per head.
        groups: G, query heads per kv head.

    Returns:
        Int64 (k * groups,), indices in n_kv * groups * head_dim, sorted ascending.
    """
    head = kept.div(head_dim, rounding_mode="floor")
    channel = kept - head * head_dim
    group = torch.arange(groups, device=kept.device)
    return ((head * groups + group[:, None]) * head_dim + channel).flatten().sort().values
