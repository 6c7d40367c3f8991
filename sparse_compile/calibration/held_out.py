"""The held-out loss of a model with maps in place, as its rise over the model as it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sparse_compile.calibration.losses import batch_loss
from sparse_compile.calibration.taps import TappedModel
from sparse_compile.options.recipe import AffineMap, ExitRecipe

__all__ = ["HeldOut"]


class HeldOut:
    """Measures with held-out batches, and measures nothing twice.

    Args:
        tapped: The model.
        batches: The held-out batches.
        done: Called after each forward.

    Attributes:
        batches: The batches.
        loss: Loss of the model as it is over all of them, nats a token.

    Raises:
        ValueError: The model returns no loss, or one that is not finite.
    """

    def __init__(self, tapped: TappedModel, batches: Sequence[Mapping[str, Any]], done: Callable[[], object]) -> None:
        self.batches = batches
        self._tapped = tapped
        self._done = done
        self._known: dict[Any, list[float]] = {}
        dense = [self._loss({}, None, batch) for batch in batches]
        self._dense = [loss for loss, _ in dense]
        self._tokens = [tokens for _, tokens in dense]
        self.loss = self._mean(self._dense)

    def rise(self, maps: Mapping[str, AffineMap], exit_: ExitRecipe | None = None, count: int | None = None) -> float:
        """Return how much higher the loss is with maps in place, nats a token; infinite where it is not finite.

        Args:
            maps: By site name; of one rank there is one map of a site.
            exit_: Where context leaves; of one block and rank there is one exit. None for nowhere.
            count: How many of the batches to measure with, the first ones; None for all.
        """
        wanted = self.batches[:count]
        behind = {} if exit_ is None else {name: each.surrogate for name, each in exit_.maps.items()}
        known = self._known.setdefault((_ranks(maps), exit_ and exit_.site, _ranks(behind)), [])
        for batch in wanted[len(known) :]:
            try:
                known.append(self._loss(maps, exit_, batch)[0])
            except ValueError:
                known.append(math.inf)  # without maps it is finite
        return self._mean(
            [with_maps - dense for with_maps, dense in zip(known, self._dense, strict=False)][: len(wanted)]
        )

    def _loss(
        self, maps: Mapping[str, AffineMap], exit_: ExitRecipe | None, batch: Mapping[str, Any]
    ) -> tuple[float, float]:
        self._tapped.put(maps, exit_)
        try:
            return batch_loss(self._tapped, batch, self._tapped.config.ignore_index)
        finally:
            self._tapped.put({})
            self._done()

    def _mean(self, losses: Sequence[float]) -> float:
        tokens = self._tokens[: len(losses)]
        return sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / sum(tokens)


def _ranks(maps: Mapping[str, AffineMap | None]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted((name, each.rank) for name, each in maps.items() if each is not None))
