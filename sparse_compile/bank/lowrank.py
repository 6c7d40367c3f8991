"""A weighted sum of products B A, again as one product of a given rank.

    M = sum_i w_i s_i B_i A_i    (out, in)    ->    M_r = B A,  the best approximation of M of rank r

The sum of the products is not the product of the sums: (sum w B)(sum w A) has the cross terms B_i A_j as well. M is
never formed. Beside each other, the factors are B_c (out, R) and A_c (R, in), R the sum of all ranks, and M = B_c A_c.

* R up to 1024: B_c = Q_b T_b and A_c' = Q_a T_a by QR, and a small SVD of T_b T_a'. This is exact but for rounding.
* Beyond, where the factors beside each other could be larger than the layer: the products of M with thin matrices are
  enough for a subspace iteration (Halko et al., arXiv 0909.4061, algorithm 4.4). The factors of one adapter are in
  memory at a time. It ends when another iteration adds less than a ten-thousandth to the square of the norm of M_r.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_compile.bank.adapter import Adapter

__all__ = ["EXACT_RANK", "Factored", "Term", "refactor"]

EXACT_RANK = 1024
"""Largest sum of ranks that is taken apart exactly: at 4096 x 14336, two seconds on two cores and 75 MB."""

_OVERSAMPLING = 16
_MOST_ITERATIONS = 12
_GAIN = 1e-4


@dataclass(frozen=True)
class Term:
    """One adapter of a sum.

    Attributes:
        adapter: an open adapter, which may lack the layer; its term is zero then.
        weight: w.
    """

    adapter: Adapter
    weight: float


@dataclass(frozen=True, eq=False)
class Factored:
    """A sum of products as one.

    Attributes:
        a: (r, in), fp32.
        b: (out, r), fp32.
        square: |M|^2, Frobenius; an estimate where not `exact`.
        kept: |B A|^2.
        exact: whether M was taken apart exactly.
    """

    a: Tensor
    b: Tensor
    square: float
    kept: float
    exact: bool


def refactor(terms: Sequence[Term], layer: str, rank: int, exact_rank: int = EXACT_RANK) -> Factored:
    """Return the sum of the terms at one layer as a product B A.

    B and A share the singular values evenly, as far as they are above a thousandth of the largest; below it A keeps its
    rows and B goes to zero, so that a training that starts here can move every row.

    Args:
        terms: adapters that agree on the sizes of the layer; at least one has it.
        layer: its path.
        rank: r; fewer where the sum has a smaller one by its shape.
        exact_rank: largest sum of ranks that is taken apart exactly.
    """
    having = [each for each in terms if layer in each.adapter.layers]
    total = sum(each.adapter.layers[layer].rank for each in having)
    sizes = having[0].adapter.layers[layer]
    rank = min(rank, total, sizes.inputs, sizes.outputs)
    if total <= exact_rank:
        left, values, right, square = _by_qr(having, layer)
    else:
        left, values, right, square = _by_iteration(having, layer, rank)
    kept = values[:rank]
    middle = kept.sqrt().clamp(min=1e-3 * float(kept[0].sqrt()) or 1e-3)
    a = middle.unsqueeze(1) * right[:, :rank].t()
    b = left[:, :rank] * (kept / middle)
    return Factored(a.contiguous(), b.contiguous(), square, float(kept.square().sum()), total <= exact_rank)


def _factors(terms: Sequence[Term], layer: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield A and w s B of each term, fp32."""
    for term in terms:
        a, b = term.adapter.factors(layer)
        yield a.float(), b.float() * (term.weight * term.adapter.layers[layer].scale)


def _by_qr(terms: Sequence[Term], layer: str) -> tuple[Tensor, Tensor, Tensor, float]:
    pairs = list(_factors(terms, layer))
    q_a, t_a = torch.linalg.qr(torch.cat([a for a, _ in pairs]).t())
    q_b, t_b = torch.linalg.qr(torch.cat([b for _, b in pairs], 1))
    u, values, vh = torch.linalg.svd(t_b @ t_a.t(), full_matrices=False)
    return q_b @ u, values, q_a @ vh.t(), float(values.double().square().sum())


def _by_iteration(terms: Sequence[Term], layer: str, rank: int) -> tuple[Tensor, Tensor, Tensor, float]:
    sizes = terms[0].adapter.layers[layer]
    width = min(rank + _OVERSAMPLING, sizes.inputs, sizes.outputs)
    generator = torch.Generator().manual_seed(0)
    image = _times(terms, layer, torch.randn(sizes.inputs, width, generator=generator))
    # The mean of |M x|^2 over x with a unit variance is |M|^2.
    square, kept = float(image.double().square().sum()) / width, 0.0
    for _ in range(_MOST_ITERATIONS):
        left = torch.linalg.qr(image).Q
        # Q' M (width, in), and its singular vectors: those of M as far as Q has them.
        within = _times_transposed(terms, layer, left)
        v, values, uh = torch.linalg.svd(within, full_matrices=False)
        found = float(values[:rank].double().square().sum())
        if found <= kept * (1 + _GAIN):
            break
        kept = found
        image = _times(terms, layer, torch.linalg.qr(within).Q)
    return left @ uh.t(), values, v, max(square, found)


def _times(terms: Sequence[Term], layer: str, thin: Tensor) -> Tensor:
    """Return M X for X (in, l)."""
    total = None
    for a, b in _factors(terms, layer):
        product = b @ (a @ thin)
        total = product if total is None else total.add_(product)
    assert total is not None, "a sum has terms"
    return total


def _times_transposed(terms: Sequence[Term], layer: str, thin: Tensor) -> Tensor:
    """Return M' X for X (out, l)."""
    total = None
    for a, b in _factors(terms, layer):
        product = a.t() @ (b.t() @ thin)
        total = product if total is None else total.add_(product)
    assert total is not None, "a sum has terms"
    return total
