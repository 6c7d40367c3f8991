"""The loss of a model over some batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

__all__ = ["batch_loss", "held_out_loss", "loss_of"]


def held_out_loss(
    call: Callable[[Mapping[str, Any]], Any],
    batches: Sequence[Mapping[str, Any]],
    done: Callable[[], object] = lambda: None,
    ignore_index: int = -100,
) -> float:
    """Return the mean loss over the tokens of some batches, nats a token.

    Args:
        call: runs a forward of a batch, and returns what the model returns: the loss, something with a `loss`, a
            mapping with one, or a tuple that begins with it.
        batches: the batches; each counts as many times as it has labels that are not ignored.
        done: called after each forward.
        ignore_index: the label that the loss ignores.

    Raises:
        ValueError: there is no loss, or one that is not finite.
    """
    total = weight = 0.0
    for batch in batches:
        loss, count = batch_loss(call, batch, ignore_index)
        total += loss * count
        weight += count
        done()
    if not weight:
        raise ValueError("no held-out batch has a label that the loss counts")
    return total / weight


def batch_loss(
    call: Callable[[Mapping[str, Any]], Any], batch: Mapping[str, Any], ignore_index: int
) -> tuple[float, float]:
    """Return the loss of one batch, nats a token, and how many tokens it is the mean of: 1 where nobody knows.

    Raises:
        ValueError: as for `held_out_loss`.
    """
    loss = float(loss_of(call(batch)))
    if not math.isfinite(loss):
        raise ValueError(f"the loss of a batch is {loss}: nothing can be measured with it")
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.dim() == 2:
        return loss, float((labels[:, 1:] != ignore_index).sum())
    return loss, 1.0


def loss_of(returned: Any) -> Tensor:
    """Return the loss in what a model returned.

    Raises:
        ValueError: there is none.
    """
    loss = returned if isinstance(returned, Tensor) else getattr(returned, "loss", None)
    if loss is None and isinstance(returned, Mapping):
        loss = returned.get("loss")
    elif loss is None and isinstance(returned, tuple) and returned:
        loss = returned[0]
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError("the model returns no loss: give it `labels`, or wrap it in a module that returns its loss")
    return loss
