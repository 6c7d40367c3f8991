"""Fit affine maps of low rank to a block by reduced-rank ridge regression on its moments.

For moments C_xx = E[x'x], C_xy = E[x'y] (centred) the best map of rank r in mean square is, with a ridge t,

    M = (C_xx + t I)^-1 C_xy          V = the leading r right singular vectors of L^-1 C_xy, L L' = C_xx + t I
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

from sparse_compile.kernels.dtypes import at_least_fp32
from sparse_compile.options.recipe import AffineMap
from sparse_compile.surrogates.moments import Moments

__all__ = ["RIDGES", "FittedMap", "error_on", "fit_maps", "held_out_error", "refit_map"]

RIDGES: Final = tuple(10.0**power for power in range(-6, 2))
"""Ridges that are tried, in units of the mean variance of an input."""

_ROUNDING_STEPS: Final = 16
"""Last digits of a mean by which an input must vary to count as varying."""

_OVERSAMPLING: Final = 16
_ITERATIONS: Final = 3
"""As for the SVD of a weight (`predictor/svd.py`): spectra fall slowly behind the first few values."""


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
    found = {0: _scored(_through_means(train, None, None), held_out, 0.0)}
    most = min(max(ranks, default=0), *train.xy.shape)
    wanted = {min(each, most) for each in ranks} - {0}
    width = min(most + _OVERSAMPLING, train.xy.shape[1])
    # On the CPU, so that numbers differ less between devices.
    basis = torch.randn(train.xy.shape[1], width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = basis.to(train.xy.device)
    for ridge in RIDGES if wanted and _varies(train) else ():
        solved = _solve(train, ridge, basis, _ITERATIONS)
        if solved is None:
            continue
        q, u, basis = solved
        for rank in wanted:
            candidate = _scored(_through_means(train, q[:rank], u[:, :rank]), held_out, ridge)
            if rank not in found or candidate.error < found[rank].error:
                found[rank] = candidate
    return {rank: found.get(min(rank, most), found[0]) for rank in ranks}


def refit_map(fitted: FittedMap, moments: Moments) -> AffineMap:
    """Fit a map again to other moments, with its ridge, starting from its outputs.

    Two steps of subspace iteration turn the span of U towards the leading right singular vectors; within that span the
    map is the best one. From step to step of a training the span hardly turns.

    Args:
        fitted: The map so far.
        moments: Moments of the tokens to fit on.

    Returns:
        A map of the same rank.
    """
    rank = fitted.map.rank
    solved = _solve(moments, fitted.ridge, fitted.map.u.double(), 2) if rank else None
    if solved is None:
        return _through_means(moments, fitted.map.q.double(), fitted.map.u.double())
    q, u, _ = solved
    return _through_means(moments, q[:rank], u[:, :rank])


def held_out_error(affine: AffineMap, moments: Moments) -> float:
    """Return the error of a map on some tokens; see `FittedMap.error`.

    It is 0 where nothing is missed, also of outputs that do not vary, and infinite where those are missed.
    """
    q, u, bias, xx, xy, mean_x, mean_y = (
        each.double()
        for each in (affine.q, affine.u, affine.bias, moments.xx, moments.xy, moments.mean_x, moments.mean_y)
    )
    offset = mean_y - u @ (q @ mean_x) - bias
    thin = q @ xx @ q.mT
    missed = moments.yy - 2 * float((u * (q @ xy).mT).sum()) + float(((u @ thin) * u).sum())
    missed = max(missed, 0.0) + moments.count * float(offset.square().sum())
    return _relative(missed, moments.yy)


def error_on(affine: AffineMap, x: Tensor, y: Tensor) -> float:
    """Return the error of a map on some tokens, from their rows; see `held_out_error`.

    Args:
        affine: the map.
        x: (n, in), n > 0.
        y: (n, out).
    """
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        dtype = at_least_fp32(affine.q)
        x, y, q, u, bias = (each.to(dtype) for each in (x, y, affine.q, affine.u, affine.bias))
        missed, varies = (
            float(each.square().sum(dtype=torch.float64)) for each in (y - x @ q.mT @ u.mT - bias, y - y.mean(0))
        )
    return _relative(missed, varies)


def _relative(missed: float, varies: float) -> float:
    if varies <= 0:
        return 0.0 if missed <= 0 else math.inf
    return math.sqrt(missed / varies)


def _varies(moments: Moments) -> bool:
    """Tell whether inputs vary by more than their rounding: a map of that would be noise, greatly magnified."""
    variance = float(moments.xx.diagonal().double().mean()) / moments.count
    rounding = _ROUNDING_STEPS * torch.finfo(moments.xx.dtype).eps
    return variance > float(moments.mean_x.double().square().mean()) * rounding**2


def _solve(moments: Moments, ridge: float, basis: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return the leading factors Q, U of the best map with a ridge, and an orthonormal basis of the span of U.

    By subspace iteration with A' A, A = L^-1 C_xy, where L L' = C_xx + t I. The components are ordered and scaled by
    the singular values of A, so that the first r of them are the map of rank r.

    Args:
        moments: of the tokens to fit on.
        ridge: in units of the mean variance of an input.
        basis: (out, k), where to start.
        iterations: number of iterations.

    Returns:
        Q (k, in), U (out, k), the basis; None where C_xx + t I is not positive definite in the moments' precision.
    """
    xx, xy = (each.double() / moments.count for each in (moments.xx, moments.xy))
    xx.diagonal().add_(ridge * float(xx.diagonal().mean()))
    root, failed = torch.linalg.cholesky_ex(xx)
    if bool(failed):
        return None
    basis = torch.linalg.qr(basis).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(xy.mT @ torch.cholesky_solve(xy @ basis, root)).Q
    left, singular, right = torch.linalg.svd(
        torch.linalg.solve_triangular(root, xy @ basis, upper=False), full_matrices=False
    )
    basis = basis @ right.mT
    # The singular value is shared out, so that both factors round alike in 16 bits.
    scale = singular.sqrt()
    q = torch.linalg.solve_triangular(root.mT, left * scale, upper=True).mT
    return q, basis * scale, basis


def _scored(found: AffineMap, held_out: Moments, ridge: float) -> FittedMap:
    return FittedMap(found, held_out_error(found, held_out), ridge)


def _through_means(moments: Moments, q: Tensor | None, u: Tensor | None) -> AffineMap:
    """Return the map through the means with these factors, none for a constant, in the dtype of the moments."""
    mean_x, mean_y = moments.mean_x.double(), moments.mean_y.double()
    q = mean_x.new_zeros(0, len(mean_x)) if q is None else q
    u = mean_y.new_zeros(len(mean_y), 0) if u is None else u
    bias = mean_y - u @ (q @ mean_x)
    return AffineMap(*(each.to(moments.xx.dtype).contiguous() for each in (q, u, bias)))
