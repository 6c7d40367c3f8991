"""Which entries of a frozen weight are zero: how many, and in which pattern."""

from __future__ import annotations

from torch import Tensor

UNSTRUCTURED = "unstructured"

_GROUPS = (4, 8, 16, 32)
"""Sizes of a group that N:M patterns are looked for with; 2:4 is also 4:8, so the smallest comes first."""

_SLACK = 0.9
"""Share of the N entries of an N:M pattern that are used on average: few zeros too many make no N:M of a weight."""


def zero_fraction(weight: Tensor) -> float:
    """Return the fraction of entries that are zero; 0 for a weight without entries."""
    return 1 - int(weight.count_nonzero()) / max(1, weight.numel())


def mask_pattern(weight: Tensor) -> str:
    """Return the pattern of the entries that are not zero: `"2:4"`, another N:M, or `"unstructured"`.

    Args:
        weight: (out, in). N:M says that of each M consecutive inputs of an output at most N are not zero.
    """
    kept = weight != 0
    share = 1 - zero_fraction(weight)
    for size in _GROUPS:
        if weight.shape[1] % size:
            continue
        most = int(kept.reshape(weight.shape[0], -1, size).sum(-1).amax()) if weight.numel() else size
        if 0 < most < size and share >= _SLACK * most / size:
            return f"{most}:{size}"
    return UNSTRUCTURED
