"""From distances to the weights of a sum of adapters.

    softmin       w = softmax(-d / T)
    standardised  w = softmax(-z / T),   z = (d - mean d) / deviation of d
    mlp           w = softmax(-f(z)),    f a small network of one number

T and f are chosen on the bank alone, by leave-one-out: adapter i is left out, the others are weighted by their
distances to its data, and the error is how far the sum points elsewhere, E_i = 1 - cos(D_i, sum_j w_ij D_j), with
D = s B A over all layers. It is not |D_i - sum_j w_ij D_j|^2, as in the paper: adapters start in random subspaces, so
even those of one task are nearly orthogonal, and the square is smallest where many of them cancel to a short sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_compile.bank.errors import BankError
from sparse_compile.bank.scorer import fitted_scorer

__all__ = ["WEIGHTINGS", "Weights", "leave_one_out_error", "standardised", "weigh"]

WEIGHTINGS = ("softmin", "standardised", "mlp")

_TEMPERATURES = torch.logspace(-2, 1, 31, dtype=torch.float64)
"""In deviations of the distances under `standardised`, in medians of them under `softmin`."""

_FEWEST = {"softmin": 3, "standardised": 3, "mlp": 4}
"""Adapters from which leave-one-out says something: with fewer, what is left has no choice."""


@dataclass(frozen=True, eq=False)
class Weights:
    """Weights of the adapters of a bank, and how they came about.

    Attributes:
        values: (n,), none negative; their sum is 1.
        temperature: T, None under `mlp`.
        error: mean of E_i over the bank by leave-one-out; None where nothing was chosen so.
    """

    values: Tensor
    temperature: float | None
    error: float | None


def weigh(
    weighting: str, own: Tensor, between: Tensor, gram: Callable[[], Tensor], temperature: float | None = None
) -> Weights:
    """Weigh the adapters of a bank for new data.

    Args:
        weighting: of `WEIGHTINGS`.
        own: (n,), distances of the new data to those of the bank.
        between: (n, n), distances between the data of the bank; the diagonal is not read.
        gram: computes (n, n), the inner products of the adapters; called where something is chosen by it.
        temperature: T; None chooses it by leave-one-out. With fewer than three adapters there is nothing to leave
            out, and T is 1 deviation or 1 median.

    Raises:
        BankError: there is no such weighting, or it cannot be had of so few adapters or with this temperature.
    """
    count = len(own)
    if weighting not in WEIGHTINGS:
        raise BankError(f"there is no weighting {weighting!r}; choose one of {', '.join(WEIGHTINGS)}")
    if temperature is not None and (weighting == "mlp" or not temperature > 0):
        raise BankError("a temperature is above zero and goes with softmin or standardised; leave it out")
    if weighting == "mlp":
        if count < _FEWEST["mlp"]:
            raise BankError(
                f"mlp is fitted by leave-one-out to at least 4 adapters, here are {count}; use standardised"
            )
        return _by_network(own, between, gram())
    rows = _without_diagonal(between) if count > 1 else between.new_zeros(1, 0)
    unit = float(rows.median()) if weighting == "softmin" and rows.numel() else 1.0
    unit = unit or 1.0
    scaled = standardised if weighting == "standardised" else lambda d: d / unit
    if temperature is not None:
        factor = temperature if weighting == "standardised" else temperature / unit
        return Weights(torch.softmax(-scaled(own) / factor, 0), temperature, None)
    if count < _FEWEST[weighting]:
        return Weights(torch.softmax(-scaled(own), 0), unit, None)
    products, left_out = gram(), scaled(rows)
    errors = [
        leave_one_out_error(_with_diagonal(torch.softmax(-left_out / each, 1)), products).mean()
        for each in _TEMPERATURES
    ]
    best = int(torch.stack(errors).argmin())
    chosen = float(_TEMPERATURES[best])
    return Weights(torch.softmax(-scaled(own) / chosen, 0), chosen * unit, float(errors[best]))


def standardised(found: Tensor) -> Tensor:
    """Return distances with mean 0 and deviation 1 along the last dimension; zeros where all are one."""
    centred = found - found.mean(-1, keepdim=True)
    deviation = centred.square().mean(-1, keepdim=True).sqrt()
    return centred / deviation.masked_fill(deviation == 0, 1)


def leave_one_out_error(weights: Tensor, gram: Tensor) -> Tensor:
    """Return E_i of each adapter, between 0 and 2.

    Args:
        weights: (n, n), row i with the weights of the others, zero on the diagonal.
        gram: (n, n), inner products of the adapters.
    """
    norms = gram.diagonal()
    squares = torch.einsum("ij,jk,ik->i", weights, gram, weights)
    return 1 - (weights * gram).sum(1) / (squares * norms).clamp(min=torch.finfo(gram.dtype).tiny).sqrt()


def _by_network(own: Tensor, between: Tensor, gram: Tensor) -> Weights:
    left_out = standardised(_without_diagonal(between))

    def loss(score: Callable[[Tensor], Tensor]) -> Tensor:
        return leave_one_out_error(_with_diagonal(torch.softmax(-score(left_out), 1)), gram).mean()

    score, error = fitted_scorer(loss)
    with torch.no_grad():
        return Weights(torch.softmax(-score(standardised(own)), 0), None, error)


def _without_diagonal(square: Tensor) -> Tensor:
    """Return (n, n - 1): each row without its own element."""
    n = len(square)
    return square[~torch.eye(n, dtype=torch.bool)].reshape(n, n - 1)


def _with_diagonal(rows: Tensor) -> Tensor:
    """Put zeros back where `_without_diagonal` took elements away."""
    n = len(rows)
    square = rows.new_zeros(n, n)
    return square.masked_scatter(~torch.eye(n, dtype=torch.bool), rows)
