"""Notice, at little cost, that a frozen weight holds other values than it did.

A write in place raises the tensor's version, and `p.data = ...` moves it to another address. Writes through `.data`, as
PEFT's merges are, do neither: for them a few elements of each weight are compared as well. Such a write is missed where
it leaves all of these alone.
"""

from __future__ import annotations

import hashlib
import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Final

import torch
from torch import Tensor

from sparse_compile.torch_private.autograd import write_count

__all__ = ["WeightWatch", "fingerprint", "identity_of", "sample_of"]

_SAMPLES: Final = 8
"""Elements that are compared along each dimension of a weight, of up to two."""

_FINGERPRINT_SAMPLES: Final = 64
"""The same of a fingerprint, which is taken once."""

Identity = tuple[object, ...]


def identity_of(weight: Tensor) -> Identity:
    """Return what an assignment or a counted write changes: address, version, dtype, shape and strides."""
    return weight.data_ptr(), write_count(weight), weight.dtype, weight.shape, weight.stride()


def sample_of(weight: Tensor, most: int = _SAMPLES) -> Tensor:
    """Return a view of evenly spaced elements of a number, a vector or a matrix, so many along each dimension at most.

    Each row of a wide matrix is sampled one column further on: a pruned weight has zeros in regular places.
    """
    sizes = [min(most, size) for size in weight.shape]
    spans, shifted = list(weight.shape), weight.dim() == 2 and weight.shape[1] >= 2 * most
    if shifted:
        spans[1] -= sizes[0] - 1
    steps = [max(1, span // most) * stride for span, stride in zip(spans, weight.stride(), strict=True)]
    if shifted:
        steps[0] += weight.stride(1)
    with torch.no_grad():
        return weight.as_strided(sizes, steps, weight.storage_offset())


def fingerprint(weights: Iterable[Tensor]) -> str:
    """Return what tells the weights of one block from those of another, as 32 hexadecimal digits.

    Up to 64 x 64 evenly spaced elements of each are read, rounded to bf16: a model that is loaded in bf16 or fp32 stays
    the same model, and no weight is read whole. In fp16 it is another one: what was rounded to fp16 is not what was
    rounded to bf16 alone.
    """
    digest = hashlib.blake2b(digest_size=16)
    for weight in weights:
        taken = sample_of(weight.detach(), _FINGERPRINT_SAMPLES).reshape(-1)
        digest.update(repr(tuple(weight.shape)).encode())
        digest.update(taken.to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class WeightWatch:
    """Tells which of some weights hold other values than when it was last asked.

    On a CPU a change is told at once. On an accelerator a write through `.data` is told when it is asked the next time:
    the comparison runs there, and waiting for it would cost more than the step that is computed in between.

    Args:
        weights: by name, the tensors that hold a weight (several for one in 4 bits). They are not kept alive.
        moves: whether tensors change their address without changing their values, as FSDP2's do: then address and
            version say nothing.
    """

    def __init__(self, weights: Mapping[str, Iterable[Tensor]], *, moves: bool = False) -> None:
        pairs = [(name, tensor) for name, tensors in weights.items() for tensor in tensors]
        self._names = [name for name, _ in pairs]
        self._refs = [weakref.ref(tensor) for _, tensor in pairs]
        self._moves = moves
        self._identities: list[Identity | None] = []
        self._samples: dict[object, tuple[list[int], Tensor]] = {}
        self._pending: list[tuple[list[int], Tensor]] = []
        self._look()

    def follow(self, weights: Mapping[str, Iterable[Tensor]]) -> None:
        """Watch these from now on, which stand where the same names stood: `changed` names those that are others."""
        pairs = [(name, tensor) for name, tensors in weights.items() for tensor in tensors]
        assert [name for name, _ in pairs] == self._names, "other weights than these were watched"
        self._refs = [weakref.ref(tensor) for _, tensor in pairs]

    def changed(self) -> frozenset[str]:
        """Return the names of the weights that changed since the last call, or since the watch was made."""
        identities, samples = self._identities, self._samples
        self._look()
        found = set() if self._moves else _places_that_differ(identities, self._identities)
        waiting, self._pending = self._pending, []
        for key, (places, values) in self._samples.items():
            if key not in samples or samples[key][0] != places:
                continue
            # Bytes, not numbers: NaN differs from NaN.
            now, before = (each.flatten(1).view(torch.uint8) for each in (values, samples[key][1]))
            differs = (now != before).any(1)
            (waiting if values.device.type == "cpu" else self._pending).append((places, differs))
        for places, differs in waiting:
            found.update(place for place, is_other in zip(places, differs.tolist(), strict=True) if is_other)
        return frozenset(self._names[place] for place in found)

    def _look(self) -> None:
        """Take identities and samples of the weights that live."""
        living = [ref() for ref in self._refs]
        self._identities = [None if tensor is None else identity_of(tensor) for tensor in living]
        groups: defaultdict[object, tuple[list[int], list[Tensor]]] = defaultdict(lambda: ([], []))
        for place, tensor in enumerate(living):
            if tensor is not None and tensor.numel():
                view = sample_of(tensor)
                places, views = groups[view.device, view.dtype, view.shape]
                places.append(place)
                views.append(view)
        self._samples = {key: (places, torch.stack(views).unsqueeze(-1)) for key, (places, views) in groups.items()}


def _places_that_differ(before: list[Identity | None], now: list[Identity | None]) -> set[int]:
    return {place for place, (old, new) in enumerate(zip(before, now, strict=True)) if new is not None and old != new}
