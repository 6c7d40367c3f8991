"""Streamed second moments of what enters a block and what leaves it: all that a fit needs.

Moments are kept centred, and two sets of them are merged by the formula of Chan, Golub and LeVeque (1983, "Algorithms
for computing the sample variance", equation 2.1, for matrices): no digits are lost where a mean is large beside its
spread, whatever the number of batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_compile.kernels.dtypes import at_least_fp32

__all__ = ["Moments", "NonFiniteActivation"]


class NonFiniteActivation(ValueError):  # noqa: N818  (it names the finding, as StopIteration does)
    """Report activations that hold NaN or infinity: nothing can be fitted on them."""


@dataclass
class Moments:
    """Moments of pairs of rows (x, y) over tokens; made by `Moments.of` or `Moments.empty`, added to in place.

    Attributes:
        count: Number of tokens; a fraction of it where older tokens count for less (`fade`).
        mean_x: (in,), fp64: a mean that moves by less than its own last digit must still move.
        mean_y: (out,), fp64.
        xx: (in, in), sum over tokens of (x - mean_x)' (x - mean_x).
        xy: (in, out), sum of (x - mean_x)' (y - mean_y).
        yy: Sum of the squares of y - mean_y, over tokens and outputs.
    """

    count: float
    mean_x: Tensor
    mean_y: Tensor
    xx: Tensor
    xy: Tensor
    yy: float

    @classmethod
    def empty(cls, in_features: int, out_features: int, like: Tensor) -> Moments:
        """Return moments of no token, in the dtype of `like` widened to fp32 at least, and on its device."""
        zeros = like.new_zeros
        dtype = at_least_fp32(like)
        x, y = (zeros(width, dtype=torch.float64) for width in (in_features, out_features))
        return cls(
            0, x, y, zeros(in_features, in_features, dtype=dtype), zeros(in_features, out_features, dtype=dtype), 0.0
        )

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> Moments:
        """Return the moments of some tokens.

        Args:
            x: (n, in), of any floating-point dtype; n may be 0.
            y: (n, out).

        Raises:
            NonFiniteActivation: x or y holds NaN or infinity, or its squares overflow.
        """
        result = cls.empty(x.shape[1], y.shape[1], x)
        result.add(x, y)
        return result

    def add(self, x: Tensor, y: Tensor, *, fade: float = 1.0) -> None:
        """Add some tokens; as for `of`.

        Args:
            x: as for `of`.
            y: as for `of`.
            fade: what the tokens so far count for from now on, so that older ones weigh less.

        Raises:
            NonFiniteActivation: as for `of`; the moments are what they were.
        """
        if len(x) == 0:
            return
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            x, y = x.detach().to(self.xx.dtype), y.detach().to(self.xx.dtype)
            means = x.mean(0), y.mean(0)
            x, y = x - means[0], y - means[1]
            # What the rounding of a mean has left.
            mean_x, mean_y = means[0].double() + x.mean(0), means[1].double() + y.mean(0)
            yy = float(y.square().sum(dtype=torch.float64))
            if not (bool(x.square().sum(0).isfinite().all()) and yy < float("inf")):
                raise NonFiniteActivation("activations of context tokens hold NaN or infinity")
            count = fade * self.count + len(x)
            share = len(x) / count
            step_x, step_y = mean_x - self.mean_x, mean_y - self.mean_y
            # The distance of the means is one more row, so that each large matrix is read and written once.
            weight = fade * self.count * share
            x, y = (
                torch.cat([rows, (math.sqrt(weight) * step).to(rows.dtype)[None]])
                for rows, step in ((x, step_x), (y, step_y))
            )
            self.xx.addmm_(x.mT, x, beta=fade)
            self.xy.addmm_(x.mT, y, beta=fade)
            self.yy = fade * self.yy + yy + weight * float(step_y.square().sum())
            self.mean_x = self.mean_x + share * step_x
            self.mean_y = self.mean_y + share * step_y
            self.count = count

    def merge(self, other: Moments) -> None:
        """Add the tokens of other moments."""
        if other.count == 0:
            return
        count = self.count + other.count
        share = other.count / count
        step_x, step_y = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        weight = self.count * share
        self.xx += other.xx
        x, y = step_x.to(self.xx.dtype), step_y.to(self.xx.dtype)
        self.xx.addr_(x, x, alpha=weight)
        self.xy += other.xy
        self.xy.addr_(x, y, alpha=weight)
        self.yy += other.yy + weight * float(step_y.square().sum())
        self.mean_x = self.mean_x + share * step_x
        self.mean_y = self.mean_y + share * step_y
        self.count = count
