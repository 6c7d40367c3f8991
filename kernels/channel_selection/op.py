"""Semantic ops of the SVD predictor (SparseLoRA, arXiv 2506.16500, section 3.2) and of the choice of channels.

They are ops of their own, rather than aten nodes, for three reasons: autocast must not touch them (scores are fp32, or
fp64 for fp64 models), the partitioner must never recompute a choice in the backward pass (a near tie would flip), and
the choice can be observed (`record_channels`, `degenerate_counts`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor

from sparse_compile.kernels.channel_selection import reference, triton, triton_scores
from sparse_compile.kernels.dtypes import at_least_fp32
from sparse_compile.kernels.providers import REFERENCE, Provider, ProviderTable, triton_runs

TOP_CHANNELS = ProviderTable(
    "top_channels",
    reference.top_channels,
    candidates=(Provider("triton", triton.top_channels, triton_runs),),
)
PREDICTED_NORMS = ProviderTable(
    "predicted_norms",
    reference.predicted_norms,
    candidates=(Provider("triton", triton.predicted_norms, triton.factors_declined),),
)
PREDICTED_SCORES = ProviderTable(
    "predicted_scores",
    reference.predicted_scores,
    candidates=(Provider("triton", triton_scores.predicted_scores, triton.factors_declined),),
)

_recorders: list[dict[str, list[Tensor]]] = []
_degenerate: dict[tuple[str, torch.device], Tensor] = {}


@torch.library.custom_op("sparselora::low_rank_product", mutates_args=())
def low_rank_product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return `(x A) B`; see `reference.low_rank_product`. Shapes (n, in), (in, r), (r, out) to (n, out)."""
    with torch.autocast(x.device.type, enabled=False):
        return reference.low_rank_product(x, a, b)


@low_rank_product.register_fake
def _(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], b.shape[1], dtype=at_least_fp32(x))


@torch.library.custom_op("sparselora::context_mean", mutates_args=())
def context_mean(x: Tensor, weights: Tensor) -> Tensor:
    """Return the mean of each sequence's context tokens, (B * S, C) to (B, C); see `reference.context_mean`."""
    with torch.autocast(x.device.type, enabled=False):
        return reference.context_mean(x, weights)


@context_mean.register_fake
def _(x: Tensor, weights: Tensor) -> Tensor:
    return x.new_empty(weights.shape[0], x.shape[1], dtype=at_least_fp32(x))


@torch.library.custom_op("sparselora::predicted_norms", mutates_args=())
def predicted_norms(
    x: Tensor, weights: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None, provider: str = REFERENCE
) -> Tensor:
    """Return the norms over rows of the predicted layer output, a channel each; see `reference.predicted_norms`.

    Args:
        x: (N, in).
        weights: (N,) 0/1: the rows that count.
        a: (in, r).
        b: (r, out).
        bias: (out,) or None.
        provider: a name of `PREDICTED_NORMS`.

    Returns:
        (out,) in the score dtype.
    """
    with torch.autocast(x.device.type, enabled=False):
        return PREDICTED_NORMS[provider](x, weights, a, b, bias)  # type: ignore[return-value]


@predicted_norms.register_fake
def _(
    x: Tensor, weights: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None, provider: str = REFERENCE
) -> Tensor:
    return x.new_empty(b.shape[1], dtype=at_least_fp32(x))


@torch.library.custom_op("sparselora::predicted_scores", mutates_args=())
def predicted_scores(
    x: Tensor,
    valid: Tensor,
    a_factors: Sequence[Tensor],
    b_factors: Sequence[Tensor],
    vectors: Sequence[Tensor],
    formula: str,
    provider: str,
) -> Tensor:
    """Return the norms over rows of a function of predicted products; see `reference.predicted_scores`.

    Args:
        x: (m, in).
        valid: (m,) bool: the rows that count.
        a_factors: (in, r_i) each.
        b_factors: (r_i, n) each.
        vectors: of n elements, or of one, each.
        formula: text over `p0..`, `v0..`.
        provider: a name of `PREDICTED_SCORES`. It has no default: of an op with lists of tensors PyTorch would drop an
            argument that equals it.

    Returns:
        (n,) in the score dtype.
    """
    run = PREDICTED_SCORES[provider]
    with torch.autocast(x.device.type, enabled=False):
        return run(x, valid, a_factors, b_factors, vectors, formula)  # type: ignore[return-value]


@predicted_scores.register_fake
def _(
    x: Tensor,
    valid: Tensor,
    a_factors: Sequence[Tensor],
    b_factors: Sequence[Tensor],
    vectors: Sequence[Tensor],
    formula: str,
    provider: str,
) -> Tensor:
    return x.new_empty(b_factors[0].shape[1], dtype=at_least_fp32(x))


@torch.library.custom_op("sparselora::top_channels", mutates_args=())
def top_channels(
    scores: Tensor, k: int, site: str, dense_step: Tensor | None = None, provider: str = REFERENCE
) -> Tensor:
    """Return the k channels of highest score, ascending; see `reference.top_channels`.

    Args:
        scores: (n,).
        k: channels to keep, 1 <= k <= n.
        site: name of the site, for `record_channels` and `degenerate_counts` only.
        dense_step: bool, without dimensions: whether the choice goes unused, because no token of this step is context.
            It is made all the same, and neither recorded nor counted.
        provider: a name of `TOP_CHANNELS`.

    Returns:
        (k,) int64.
    """
    count = _degenerate_count(site, scores.device)
    chosen = TOP_CHANNELS[provider](scores, k)
    channels, informative = cast("tuple[Tensor, Tensor]", chosen)
    count += ~informative if dense_step is None else ~informative & ~dense_step
    # Reading the flag waits for a GPU, so only what observes pays for it.
    if _recorders and not (dense_step is not None and bool(dense_step)):
        for recorder in _recorders:
            recorder.setdefault(site, []).append(channels)
    return channels


@top_channels.register_fake
def _(scores: Tensor, k: int, site: str, dense_step: Tensor | None = None, provider: str = REFERENCE) -> Tensor:
    return scores.new_empty(k, dtype=torch.int64)


@torch.library.custom_op("sparselora::spaced_rows", mutates_args=())
def spaced_rows(weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Pick `count` evenly spaced rows of each sequence; see `reference.spaced_rows`."""
    return reference.spaced_rows(weights, count)


@spaced_rows.register_fake
def _(weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
    rows = weights.shape[0] * count
    return weights.new_empty(rows, dtype=torch.int64), weights.new_empty(rows, dtype=torch.bool)


def _degenerate_count(site: str, device: torch.device) -> Tensor:
    key = site, device
    if key not in _degenerate:
        _degenerate[key] = torch.zeros((), dtype=torch.int64, device=device)
    return _degenerate[key]


def prepare_count(site: str, device: torch.device) -> None:
    """Make the counter of a site before anything runs: one made inside of a CUDA graph would be of its memory."""
    _degenerate_count(site, device)


@contextmanager
def record_channels() -> Iterator[dict[str, list[Tensor]]]:
    """Record every choice of channels made inside the block: site name to the index tensors, in order of execution."""
    record: dict[str, list[Tensor]] = {}
    _recorders.append(record)
    try:
        yield record
    finally:
        # By identity: an equal record of an outer block must stay.
        _recorders[:] = [other for other in _recorders if other is not record]


def degenerate_counts() -> Counter[str]:
    """Return how often each site's scores were all zero or not finite, so that the lowest channels were kept."""
    counts: Counter[str] = Counter()
    for (site, _), count in _degenerate.items():
        counts[site] += int(count)
    return +counts
