"""A map that is fitted while a model trains, on the tokens of its dense steps, and written in place.

Older tokens fade: adapters change what a block reads and returns, and a map of what it did a hundred steps ago is of
another model. The first fit is by `fit_maps`, which chooses the ridge by held-out batches. Those that follow keep the
ridge and start from the directions there are, so that they cost one factorisation of C_xx and some thin products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from sparse_compile.options.recipe import AffineMap
from sparse_compile.surrogates.fit import FittedMap, error_on, fit_maps, refit_map
from sparse_compile.surrogates.moments import Moments

__all__ = ["OnlineMap"]

HELD_OUT_EVERY: Final = 4
"""Of the batches before the first fit, each fourth chooses the ridge."""

FADE: Final = 0.9
"""What the tokens that maps were fitted to count for when those of another dense step come."""

_TOKENS_FOR_EACH: Final = 4
_LEAST_ROWS: Final = 512
"""Of a batch, at least so many rows are taken, or one for two inputs: of ten dense steps then come five for each."""


class OnlineMap:
    """A map whose buffers a compiled graph reads.

    Args:
        surrogate: its buffers; they are written in place.
        fitted: whether they hold a map already.
        left_at: name of the attention block before which context tokens left the stream that the map adds to; empty for
            the map of a feed-forward block.
        weights: returns the fingerprint of the frozen weights that the map stands for, as they are now.

    Attributes:
        surrogate: the buffers.
        left_at, weights: as given.
        error: of the last map, on tokens that it was not fitted on; NaN before the first fit.
        fitted: whether the buffers hold a map.
        pending: whether tokens came since the last fit.
    """

    def __init__(
        self, surrogate: AffineMap, *, fitted: bool = False, left_at: str = "", weights: Callable[[], str] = str
    ) -> None:
        self.surrogate = surrogate
        self.left_at = left_at
        self.weights = weights
        self.fitted = fitted
        self.error = float("nan")
        self.pending = False
        self._last: FittedMap | None = None
        self.forget()

    @property
    def tokens(self) -> float:
        """Number of tokens that a fit would be made on, older ones counting for less."""
        return self._train.count

    @property
    def ready(self) -> bool:
        """Whether there are tokens enough for a fit, and others to choose its ridge by.

        A map that was given has been fitted to many tokens: it is not replaced by one of few.
        """
        given = self.fitted and self._last is None
        wanted = self.surrogate.q.shape[1] if given else max(self.surrogate.rank, 1)
        enough = self._train.count >= _TOKENS_FOR_EACH * wanted
        return enough and (self._held_out is None or self._held_out.count > 0)

    def forget(self) -> None:
        """Drop all tokens: the weights are others than they were."""
        widths = self.surrogate.q.shape[1], self.surrogate.u.shape[0]
        self._train = Moments.empty(*widths, self.surrogate.q)
        self._held_out: Moments | None = Moments.empty(*widths, self.surrogate.q)  # until the first fit
        self._batches = 0
        self._last = None
        self.pending = False

    def collect(self, x: Tensor, y: Tensor) -> None:
        """Take the rows of some context tokens: all of few, evenly spaced ones of many.

        Args:
            x: (n, in), what the block reads.
            y: (n, out), what it returns, adapters included.
        """
        if not len(x):
            return
        wanted = max(_LEAST_ROWS, self.surrogate.q.shape[1] // 2)
        if wanted < len(x):
            picked = torch.arange(wanted, device=x.device) * len(x) // wanted
            x, y = x[picked], y[picked]
        if self._held_out is not None:
            is_fourth = self._batches % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
            (self._held_out if is_fourth else self._train).add(x, y)
        else:
            self._train.add(x, y, fade=1.0 if self.pending else FADE)  # once a step, of however many batches it is
            # The tokens of this step are none that the map has seen: its error on them is that of the steps since.
            self.error = error_on(self.surrogate, x, y)
        self.pending = True
        self._batches += 1

    def fit(self) -> None:
        """Fit the map to the tokens so far, and write it into the buffers."""
        if self._last is None:
            assert self._held_out is not None, "the ridge is chosen once"
            self._last = fit_maps(self._train, self._held_out, [self.surrogate.rank])[self.surrogate.rank]
            self.error = self._last.error
            self._train.merge(self._held_out)
            self._held_out = None
        else:
            self._last = FittedMap(refit_map(self._last, self._train), self.error, self._last.ridge)
        self._write(self._last.map)
        self.fitted, self.pending = True, False

    def _write(self, found: AffineMap) -> None:
        rank = found.rank
        with torch.no_grad():
            # A map of lower rank, such as a constant, leaves the rest of the factors at zero.
            self.surrogate.q.zero_()[:rank].copy_(found.q)
            self.surrogate.u.zero_()[:, :rank].copy_(found.u)
            self.surrogate.bias.copy_(found.bias)
