"""Know the number of output tokens of the next forward before it runs, for the option `token_bucket`.

A graph of fixed sizes has to be chosen before it is entered, so the number comes from labels that are still on the CPU,
outside of the compiled code: those of `token_roles(...)`, or those that a call of the model is given
(`SparseLoRACallback`). Rounded up to a multiple of the bucket it is a plain number in `CAPACITIES`, which the backend
has Dynamo guard on: another bucket selects, or compiles, another graph; the same one costs a comparison.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import torch
from torch import Tensor

from sparse_compile.kernels.roles.reference import output_mask
from sparse_compile.training.told import IN_PROCESS

__all__ = [
    "CAPACITIES",
    "OutputCount",
    "announce",
    "announced_count",
    "capacity_for",
    "known_tokens",
    "watch",
    "withdraw",
]

_LOGGER: Final = logging.getLogger(__name__)

CAPACITIES: Final[dict[str, int]] = {}
"""The output tokens of the next forward, rounded up, by a name of the bucket and the shift of the labels; for guards.

0 where nothing tells. Like `roles.ROLES_GIVEN` it spans all threads of the process: what was announced last counts.
"""


class OutputCount(NamedTuple):
    """The number of output tokens of a batch.

    Attributes:
        shifted: where position t predicts `labels[:, t]` (labels that were shifted beforehand).
        causal: where position t predicts `labels[:, t + 1]`.
        ignore_index: the label that was taken to carry no loss; None where the roles themselves were counted.
    """

    shifted: int
    causal: int
    ignore_index: int | None = None

    def of(self, shift: int) -> int:
        """Return the number for labels with a shift of 0 or 1."""
        return self.causal if shift else self.shifted


@dataclass(eq=False)
class _Announcement:
    """A batch whose tokens are counted when somebody wants to know: a mask of output tokens, or labels."""

    tensor: Tensor
    ignore_index: int | None
    _count: OutputCount | None = field(default=None, init=False)

    def count(self) -> OutputCount:
        if self._count is None:
            if self.tensor.device.type != "cpu":
                _tell_of_waiting()
            self._count = _count(self.tensor, self.ignore_index)
        return self._count


_announced: list[_Announcement] = []
_keys: dict[str, tuple[int, int]] = {}
_LOCK: Final = threading.RLock()


def announce(tensor: Tensor, ignore_index: int | None) -> None:
    """Say what the next forwards are given, until it is withdrawn.

    Args:
        tensor: (B, S) labels, or the mask of output tokens (bool). It is read at once where a graph depends on it, and
            otherwise not before one does: on a GPU that waits for the device.
        ignore_index: the label that carries no loss; None for a mask.
    """
    with _LOCK:
        _announced.append(_Announcement(tensor, ignore_index))
        _refresh()


def withdraw(tensor: Tensor) -> None:
    """End the last announcement of a tensor."""
    with _LOCK:
        index = max(index for index, each in enumerate(_announced) if each.tensor is tensor)
        del _announced[index]
        _refresh()


@contextmanager
def known_tokens(labels: Tensor, ignore_index: int = -100) -> Iterator[None]:
    """Announce the labels of the forward inside the block."""
    announce(labels, ignore_index)
    try:
        yield
    finally:
        withdraw(labels)


def announced_count() -> OutputCount | None:
    """Return the number of output tokens of the next forward, None where nothing tells."""
    with _LOCK:
        return _announced[-1].count() if _announced else None


def watch(bucket: int, shift: int) -> str:
    """Return the key of a capacity in `CAPACITIES`, which is kept up to date from now on."""
    with _LOCK:
        key = f"{bucket} shift {shift}"
        _keys[key] = bucket, shift
        _refresh()
        return key


def capacity_for(count: int, bucket: int) -> int:
    """Round a number of output tokens up to a multiple of the bucket, one bucket at the least."""
    return max(1, -(-count // bucket)) * bucket


def _refresh() -> None:
    if _keys:
        count = announced_count()
        for key, (bucket, shift) in _keys.items():
            CAPACITIES[key] = 0 if count is None else capacity_for(count.of(shift), bucket)


def _count(tensor: Tensor, ignore_index: int | None) -> OutputCount:
    if ignore_index is None:
        outputs = int(tensor.sum())
        return OutputCount(outputs, outputs)
    shifted, causal = torch.stack([output_mask(tensor, ignore_index, shift).sum() for shift in (0, 1)]).tolist()
    return OutputCount(shifted, causal, ignore_index)


def _tell_of_waiting() -> None:
    if IN_PROCESS.once("token_bucket waits for the device"):
        _LOGGER.info(
            "token_bucket: labels are on the device when their tokens are counted, which waits for it once a step; "
            "open token_roles(labels=...) with labels on the CPU to have none"
        )
