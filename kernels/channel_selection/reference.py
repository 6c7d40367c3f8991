"""The specification of channel prediction and selection, in plain PyTorch. Nothing of it is differentiated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_compile.kernels.codegen.formula import parsed, select
from sparse_compile.kernels.dtypes import at_least_fp32


def low_rank_product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return `(x A) B` in the score dtype: the prediction of `x W^T` from the SVD factors W^T ~ A B."""
    dtype = at_least_fp32(x)
    return (x.to(dtype) @ a.to(dtype)) @ b.to(dtype)


def context_mean(x: Tensor, weights: Tensor) -> Tensor:
    """Return the mean of each sequence's context tokens; zero for a sequence that has none.

    Args:
        x: (B * S, C).
        weights: (B, S) 0/1: the tokens that count.

    Returns:
        (B, C) in the score dtype.
    """
    dtype = at_least_fp32(x)
    counting = weights.to(dtype)
    total = torch.bmm(counting.unsqueeze(1), x.reshape(*weights.shape, -1).to(dtype)).squeeze(1)
    return total / counting.sum(1, keepdim=True).clamp_min(1)


def predicted_norms(x: Tensor, weights: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """Return, for each output channel, the L2 norm over the rows of the predicted `x W^T + bias`.

    The (N, out) prediction is never formed. With u = diag(weights) x A, G = u^T u (r x r), s = u^T weights (r):
    ||u b_c + weights * bias_c||^2 = b_c^T G b_c + 2 bias_c s^T b_c + bias_c^2 ||weights||^2.

    Args:
        x: (N, in).
        weights: (N,) 0/1: the rows that count.
        a: (in, r).
        b: (r, out).
        bias: (out,) or None.

    Returns:
        (out,) in the score dtype.
    """
    dtype = at_least_fp32(x)
    weights, b = weights.to(dtype), b.to(dtype)
    u = (x.to(dtype) @ a.to(dtype)) * weights.unsqueeze(1)
    squared = (b * (u.T @ u @ b)).sum(0)
    if bias is not None:
        bias = bias.to(dtype)
        squared = squared + 2 * bias * (weights @ u @ b) + bias.square() * weights.square().sum()
    return squared.clamp_min(0).sqrt()


def predicted_scores(
    x: Tensor,
    valid: Tensor,
    a_factors: Sequence[Tensor],
    b_factors: Sequence[Tensor],
    vectors: Sequence[Tensor],
    formula: str,
) -> Tensor:
    """Return, for each channel, the L2 norm over rows of a function of predicted products.

    The products are p_i = (x A_i) B_i, the channel's score is ||f(p_0, .., v_0, ..)||.

    Args:
        x: (m, in).
        valid: (m,) bool: the rows that count.
        a_factors: (in, r_i) each.
        b_factors: (r_i, n) each.
        vectors: of n elements, or of one, each.
        formula: text of f over `p0..`, `v0..`.

    Returns:
        (n,) in the score dtype.
    """
    dtype = at_least_fp32(x)
    products = [low_rank_product(x, a, b) for a, b in zip(a_factors, b_factors, strict=True)]
    operands = {f"p{index}": product for index, product in enumerate(products)}
    operands |= {f"v{index}": vector.reshape(-1).to(dtype) for index, vector in enumerate(vectors)}
    hidden = parsed(formula).evaluate(operands)
    if parsed(formula).expression.has(select):
        # A comparison with a NaN is false; PyTorch's functions with a kink pass it on.
        for name in parsed(formula).operands:
            hidden = torch.where(operands[name].isnan(), operands[name], hidden)
    hidden = torch.where(valid.unsqueeze(1), hidden.expand_as(products[0]), 0.0)
    norms: Tensor = torch.linalg.vector_norm(hidden, dim=0)
    return norms


def top_channels(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the indices of the k highest scores, ascending, and whether the scores say anything, a 0-dim bool.

    The lowest index wins a tie. A vector that is all zero or not finite says nothing about any channel: the lowest k
    indices are kept.
    """
    informative = scores.isfinite().all() & scores.any()
    ranked = scores.nan_to_num().sort(descending=True, stable=True).indices[:k].sort().values
    return torch.where(informative, ranked, torch.arange(k, device=scores.device)), informative


def spaced_rows(weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Pick `count` evenly spaced rows of each sequence among those that count.

    Row i of the c counting rows of a sequence is picked for i = floor(j * c / count), j = 0 .. count-1 (all of them,
    some repeated, where c < count; a repeated row counts once).

    Args:
        weights: (B, S) 0/1.
        count: rows per sequence.

    Returns:
        `(rows, valid)`: (B * count,) int64 flattened positions, and (B * count,) bool that marks those to use.
    """
    batch, length = weights.shape
    counting = weights.bool()
    available = counting.sum(1, keepdim=True)
    wanted = torch.arange(count, device=weights.device) * available // count
    # A stable sort puts the counting positions of a row first, in their order.
    order = counting.logical_not().to(torch.uint8).sort(dim=1, stable=True).indices
    rows = order.gather(1, wanted.clamp_max(length - 1))
    repeated = torch.cat([wanted.new_zeros(batch, 1, dtype=torch.bool), wanted[:, 1:] == wanted[:, :-1]], dim=1)
    valid = (available > 0) & ~repeated
    offsets = torch.arange(batch, device=weights.device).unsqueeze(1) * length
    return (rows + offsets).reshape(-1), valid.reshape(-1)
