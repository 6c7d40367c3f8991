"""Distances between distributions over token ids, of all pairs at once.

With p and q two distributions, m = (p + q) / 2, and x the place of a token (its ground):

    kl              sum p log(p / q)                          q and p mixed with the mean of all distributions
    jensen_shannon  sqrt(KL(p, m) / 2 + KL(q, m) / 2)         a metric, at most sqrt(log 2)
    mmd             sqrt((p - q)' K (p - q))                  K[x, y] = mean over c of c^2 / (c^2 + |x - y|^2)
    wasserstein     mean over directions of W1, in one dimension  W1 = integral of |P - Q|, cumulative sums along it
    wasserstein_ids W1 with token ids as places

The ground of `mmd` and `wasserstein` is the base's input embedding on 32 random directions: tokens that the model takes
for alike are near. The paper's ground is the id. A tokenizer gives ids by frequency, so near ids are alike in how often
they occur and in nothing else; `wasserstein_ids` is there for comparison.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from sparse_compile.bank.errors import BankError

__all__ = ["DISTANCES", "ON_EMBEDDINGS", "distances"]

_BACKGROUND = 0.01
"""Share of the mean distribution in each under `kl`: else a token that a data set lacks is an infinite distance."""

_SCALES = (0.25, 0.5, 1.0, 2.0)
"""Widths of the kernel of `mmd`, in medians of the distance between two tokens."""

_BLOCK = 4096
"""Tokens that are looked at in one go: what is computed of them must not outgrow the counts."""

_KERNEL_ROWS = 256
_SAMPLED = 1024
"""Tokens whose distances have the median that the kernel's widths are taken from."""

_Distance: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def distances(name: str, counts: Tensor, ids: Tensor, points: Tensor | None) -> Tensor:
    """Return the distances of all pairs of data sets.

    Args:
        name: of `DISTANCES`.
        counts: (n, v), how often each of v tokens stands in each data set.
        ids: (v,), these tokens.
        points: (vocabulary, d), the ground; `mmd` and `wasserstein` need it.

    Returns:
        (n, n) of fp64; row i has the distances of data set i to the others. Only `kl` is not symmetric.

    Raises:
        BankError: there is no such distance, or it needs a ground that the bank has not.
    """
    if name not in DISTANCES:
        raise BankError(f"there is no distance {name!r}; choose one of {', '.join(DISTANCES)}")
    if name not in ON_EMBEDDINGS:
        places = ids.double().unsqueeze(1)
    elif points is None:
        raise BankError(
            f"{name} needs the base's input embedding, which was not found when the bank was made; "
            "choose jensen_shannon, kl or wasserstein_ids"
        )
    else:
        places = points[ids].double()
    counts = counts.double()
    return DISTANCES[name](counts / counts.sum(1, keepdim=True), places)


def _kl(p: Tensor, _: Tensor) -> Tensor:
    mixed = (1 - _BACKGROUND) * p + _BACKGROUND * p.mean(0)
    found: Tensor = torch.special.xlogy(mixed, mixed).sum(1, keepdim=True) - mixed @ mixed.log().t()
    return found.clamp(min=0)


def _jensen_shannon(p: Tensor, _: Tensor) -> Tensor:
    negentropy = torch.special.xlogy(p, p).sum(1)
    found: Tensor = (negentropy + negentropy.unsqueeze(1)) / 2
    for block in torch.split(p, _BLOCK, 1):
        for i, row in enumerate(block):
            middle = (row + block) / 2
            found[i] -= torch.special.xlogy(middle, middle).sum(1)
    return found.clamp(min=0).sqrt()


def _mmd(p: Tensor, places: Tensor) -> Tensor:
    sampled = places[:: -(-len(places) // _SAMPLED)]
    median = float(torch.pdist(sampled).median()) if len(sampled) > 1 else 1.0
    widths = [(scale * median) ** 2 or 1.0 for scale in _SCALES]
    gram = p.new_zeros(len(p), len(p))
    for rows, own in zip(torch.split(places, _KERNEL_ROWS), torch.split(p, _KERNEL_ROWS, 1), strict=True):
        squares = torch.cdist(rows, places, compute_mode="donot_use_mm_for_euclid_dist").square_()
        kernel = torch.zeros_like(squares)
        for width in widths:
            kernel += width / (width + squares) / len(widths)
        gram += own @ (kernel @ p.t())
    norms = gram.diagonal()
    return (norms.unsqueeze(1) + norms - gram - gram.t()).clamp(min=0).sqrt()


def _wasserstein(p: Tensor, places: Tensor) -> Tensor:
    total = p.new_zeros(len(p), len(p))
    for along in places.t():
        order = along.argsort()
        gaps = along[order].diff()
        below = p.new_zeros(len(p), 1)
        for block, widths in zip(torch.split(order[:-1], _BLOCK), torch.split(gaps, _BLOCK), strict=True):
            cumulative = p[:, block].cumsum(1) + below
            below = cumulative[:, -1:]
            weighted = cumulative * widths
            total += torch.cdist(weighted, weighted, p=1)
    return total / places.shape[1]


DISTANCES: dict[str, _Distance] = {
    "jensen_shannon": _jensen_shannon,
    "kl": _kl,
    "mmd": _mmd,
    "wasserstein": _wasserstein,
    "wasserstein_ids": _wasserstein,
}
"""By name: from (n, v) probabilities and (v, d) places of the tokens, (n, n)."""

ON_EMBEDDINGS = ("mmd", "wasserstein")
"""Those whose ground is the base's input embedding."""
