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

from collections.abc import Callable, Iterator
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


def distances(name: str, probabilities: Tensor, ids: Tensor, points: Tensor | None) -> Tensor:
    """Return the distances of all pairs of data sets.

    Args:
        name: of `DISTANCES`.
        probabilities: (n, v), fp32: the share of each of v tokens in each data set. They are the largest of what is in
            memory; sums over them are in fp64.
        ids: (v,), these tokens; each occurs in some data set.
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
    return DISTANCES[name](probabilities, places)


def _blocks(p: Tensor) -> Iterator[Tensor]:
    """Yield the columns of p, some at a time, in fp64."""
    for block in torch.split(p, _BLOCK, 1):
        yield block.double()


def _kl(p: Tensor, _: Tensor) -> Tensor:
    own, cross = p.new_zeros(len(p), 1, dtype=torch.float64), p.new_zeros(len(p), len(p), dtype=torch.float64)
    for block in _blocks(p):
        mixed = (1 - _BACKGROUND) * block + _BACKGROUND * block.mean(0)
        logs = mixed.log()
        own += (mixed * logs).sum(1, keepdim=True)
        cross += mixed @ logs.t()
    return (own - cross).clamp(min=0)


def _jensen_shannon(p: Tensor, _: Tensor) -> Tensor:
    # Of all pairs, the sum of m log m; of a pair of one, that is the sum of p log p.
    negentropy = p.new_zeros(len(p), len(p), dtype=torch.float64)
    tiny = torch.finfo(p.dtype).tiny
    for block in torch.split(p, _BLOCK, 1):
        for i, row in enumerate(block):
            middle = (row + block[i:]) / 2
            negentropy[i, i:] += (middle * middle.clamp(min=tiny).log()).sum(1, dtype=torch.float64)
    own = negentropy.diagonal()
    found = ((own.unsqueeze(1) + own) / 2 - negentropy).triu(1).clamp(min=0).sqrt()
    return found + found.t()


def _mmd(p: Tensor, places: Tensor) -> Tensor:
    sampled = places[:: -(-len(places) // _SAMPLED)]
    median = float(torch.pdist(sampled).median()) if len(sampled) > 1 else 1.0
    widths = [(scale * median) ** 2 or 1.0 for scale in _SCALES]
    gram = p.new_zeros(len(p), len(p), dtype=torch.float64)
    for rows, own in zip(torch.split(places, _KERNEL_ROWS), torch.split(p, _KERNEL_ROWS, 1), strict=True):
        smoothed = p.new_zeros(len(rows), len(p), dtype=torch.float64)
        for others, block in zip(torch.split(places, _BLOCK), _blocks(p), strict=True):
            squares = torch.cdist(rows, others).square_()
            kernel = torch.zeros_like(squares)
            for width in widths:
                kernel += width / (width + squares) / len(widths)
            smoothed += kernel @ block.t()
        gram += own.double() @ smoothed
    norms = gram.diagonal()
    return (norms.unsqueeze(1) + norms - gram - gram.t()).clamp(min=0).sqrt()


def _wasserstein(p: Tensor, places: Tensor) -> Tensor:
    total = p.new_zeros(len(p), len(p), dtype=torch.float64)
    for along in places.t():
        order = along.argsort()
        gaps = along[order].diff()
        below = p.new_zeros(len(p), 1, dtype=torch.float64)
        for block, widths in zip(torch.split(order[:-1], _BLOCK), torch.split(gaps, _BLOCK), strict=True):
            cumulative = p[:, block].double().cumsum(1) + below
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
"""By name: from (n, v) probabilities, fp32, and (v, d) places of the tokens, fp64, (n, n)."""

ON_EMBEDDINGS = ("mmd", "wasserstein")
"""Those whose ground is the base's input embedding."""
