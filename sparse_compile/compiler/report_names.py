"""Names of sites and layers for people: those of equal blocks as ranges, without what all of them begin with."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import takewhile

__all__ = ["at_block", "fold", "shared_prefix"]

_BLOCK = re.compile(r"(?P<before>(?:[^.]+\.)*?)(?P<number>0|[1-9]\d*)(?P<after>\..*)?")


def at_block(name: str) -> tuple[str, int | None, str]:
    """Split a name at the number of its block: `"model.layers.3.mlp"` is `("model.layers.", 3, ".mlp")`.

    A name without a number is returned whole, with None and an empty rest.
    """
    found = _BLOCK.fullmatch(name)
    return (name, None, "") if found is None else (found["before"], int(found["number"]), found["after"] or "")


def fold(names: Iterable[str]) -> list[str]:
    """Return names, in the order of the first, with those that differ in the block alone as one: `layers.0-3,5.mlp`."""
    groups: dict[tuple[str, str], set[int]] = {}
    for name in names:
        before, number, after = at_block(name)
        groups.setdefault((before, after), set()).update(() if number is None else (number,))
    return [f"{before}{_ranges(numbers)}{after}" for (before, after), numbers in groups.items()]


def _ranges(numbers: Iterable[int]) -> str:
    """Return numbers as text, with runs of them as ranges."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)


def shared_prefix(names: Iterable[str]) -> str:
    """Return what all names begin with, up to the list of the blocks: `"base_model.model."` of its `layers.3.mlp`."""
    parents = [at_block(name)[0].removesuffix(".").split(".")[:-1] for name in names]
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*parents, strict=False))
    return "".join(f"{part}." for part, *_ in shared)
