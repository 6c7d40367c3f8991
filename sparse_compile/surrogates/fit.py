"""Fit affine maps of low rank to a block by reduced-rank ridge regression on its moments.

For moments C_xx = E[x'x], C_xy = E[x'y] (centred) the best map of rank r in mean square is, with a ridge t,

    M = (C_xx + t I)^-1 C_xy          V = the leading r right singular vectors of (C_xx + t I)^-1/2 C_xy
    y ~ U (Q x) + b                   U Q = V V' M', b = mean(y) - U Q mean(x)

(Izenman 1975, "Reduced-rank regression for the multivariate linear model"; with a ridge: Mukherjee and Zhu 2011). How
strong the ridge must be depends on how many tokens there are, so it is chosen, for each rank, by tokens that no fit has
seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from sparse_compile.options.recipe import AffineMap
from sparse_compile.predictor.svd import factorize
from sparse_compile.surrogates.moments import Moments

__all__ = ["RIDGES", "FittedMap", "fit_maps", "held_out_error", "refit_map"]

RIDGES: Final = tuple(10.0**power for power in range(-6, 2))
"""Ridges that are tried, in units of the mean variance of an input."""

_ROUNDING_STEPS: Final = 16
"""Last digits of a mean by which an input must vary to count as varying."""


@dataclass(frozen=True)
class FittedMap:
    """A map and how well it predicts tokens that it was not fitted on.

    Attributes:
        map: The map.
        error: Root mean square of what it misses over that of what the best constant misses; 1 for the constant of the
            same tokens, 0 for a map that misses nothing.
        ridge: The ridge that was chosen, in units of the mean variance of an input; 0 for a constant.
    """

    map: AffineMap
    error: float
    ridge: float


def fit_maps(train: Moments, held_out: Moments, ranks: Sequence[int]) -> Mapping[int, FittedMap]:
    """Fit a map of each rank; rank 0 is the constant.

    Args:
        train: Moments of the tokens to fit on.
        held_out: Moments of other tokens, which choose the ridge and give the error.
        ranks: Ranks to fit, at least 0. More than x or y has dimensions gives that many.

    Returns:
        By rank as it was asked for, a map in the dtype and on the device of the moments.

    Raises:
        ValueError: There is no token to fit on, or none that was held out.
    """
    if not train.count or not held_out.count:
        raise ValueError("a fit needs context tokens to fit on and others to check it with, and there are none")
    mean_x, mean_y = train.mean_x.double().cpu(), train.mean_y.double().cpu()
    xx, xy = (each.double().cpu() / train.count for each in (train.xx, train.xy))
    variances, directions = torch.linalg.eigh(xx)
    variances = variances.clamp(min=0)
    unit = float(variances.mean())
    # An input that varies by its rounding alone tells nothing: a map of it would be noise, greatly magnified.
    rounding = float(mean_x.square().mean()) * (_ROUNDING_STEPS * torch.finfo(train.xx.dtype).eps) ** 2
    constant = FittedMap(_map(mean_x, mean_y, None, None, train), math.nan, 0.0)
    found = {0: _scored(constant, held_out)}
    most = min(max(ranks, default=0), *xy.shape)
    if unit > rounding and most > 0:
        rotated = directions.mT @ xy
        for ridge in RIDGES:
            root = (variances + ridge * unit).rsqrt()
            factors = factorize((root[:, None] * rotated).mT, most, seed=0)
            q, u = (directions * root @ factors.a).mT, factors.b.mT
            for rank in {min(each, most) for each in ranks} - {0}:
                candidate = _scored(
                    FittedMap(_map(mean_x, mean_y, q[:rank], u[:, :rank], train), math.nan, ridge), held_out
                )
                if rank not in found or candidate.error < found[rank].error:
                    found[rank] = candidate
    return {rank: found.get(min(rank, most), found[0]) for rank in ranks}


def refit_map(fitted: FittedMap, moments: Moments) -> AffineMap:
    """Fit a map again to other moments, with its ridge, starting from its outputs.

    One step of subspace iteration turns the span of U towards the leading right singular vectors; within that span
    the map is the best one. From step to step of a training the span hardly turns.

    Args:
        fitted: The map so far.
        moments: Moments of the tokens to fit on.

    Returns:
        A map of the same rank.
    """
    u = fitted.map.u.double().cpu()
    if fitted.map.rank == 0:
        return AffineMap(fitted.map.q, fitted.map.u, moments.mean_y.to(fitted.map.bias))
    mean_x, mean_y = moments.mean_x.double().cpu(), moments.mean_y.double().cpu()
    xx, xy = (each.double().cpu() / moments.count for each in (moments.xx, moments.xy))
    xx.diagonal().add_(fitted.ridge * float(xx.diagonal().mean()))
    root = torch.linalg.cholesky(xx)
    basis = torch.linalg.qr(u).Q
    for _ in range(2):
        basis = torch.linalg.qr(xy.mT @ torch.cholesky_solve(xy @ basis, root)).Q
    q = torch.cholesky_solve(xy @ basis, root).mT
    # Balanced as the first fit is, so that both factors round alike in 16 bits.
    left, singular, right = torch.linalg.svd(q, full_matrices=False)
    scale = singular.sqrt()
    return _map(mean_x, mean_y, scale[:, None] * right, basis @ left * scale, moments)


def held_out_error(affine: AffineMap, moments: Moments) -> float:
    """Return the error of a map on some tokens; see `FittedMap.error`.

    It is 0 where nothing is missed, also of outputs that do not vary, and infinite where those are missed.
    """
    q, u, bias, xx, xy, mean_x, mean_y = (
        each.double().cpu()
        for each in (affine.q, affine.u, affine.bias, moments.xx, moments.xy, moments.mean_x, moments.mean_y)
    )
    offset = mean_y - u @ (q @ mean_x) - bias
    thin = q @ xx @ q.mT
    missed = moments.yy - 2 * float((u * (q @ xy).mT).sum()) + float(((u @ thin) * u).sum())
    missed = max(missed, 0.0) + moments.count * float(offset.square().sum())
    if moments.yy <= 0:
        return 0.0 if missed <= 0 else math.inf
    return math.sqrt(missed / moments.yy)


def _scored(fitted: FittedMap, held_out: Moments) -> FittedMap:
    return FittedMap(fitted.map, held_out_error(fitted.map, held_out), fitted.ridge)


def _map(mean_x: Tensor, mean_y: Tensor, q: Tensor | None, u: Tensor | None, like: Moments) -> AffineMap:
    """Return the map through the means with these factors, none for a constant, in the dtype of the moments."""
    q = mean_x.new_zeros(0, len(mean_x)) if q is None else q
    u = mean_y.new_zeros(len(mean_y), 0) if u is None else u
    bias = mean_y - u @ (q @ mean_x)
    return AffineMap(*(each.to(like.xx).contiguous() for each in (q, u, bias)))
