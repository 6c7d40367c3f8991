"""The texts of a graph after each pass, each line stored once, with what every pass changed."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

__all__ = ["graph_changes"]


def graph_changes(steps: Mapping[str, str]) -> dict[str, Any]:
    """Return texts as data from which a page puts them together.

    Args:
        steps: the text of the graph by step, in order.

    Returns:
        `lines`: each distinct line once. `steps`: of each step its `name`, its text as `runs` of such lines (pairs of
        the first and their number), and as `changes` to the step before (start and end there, start and end here;
        lines between two of them are equal).
    """
    numbers: dict[str, int] = {}
    found = []
    before: list[int] | None = None
    for name, text in steps.items():
        after = [numbers.setdefault(line, len(numbers)) for line in text.splitlines()]
        changes = [] if before is None or before == after else _changes(before, after)
        found.append({"name": name, "runs": _runs(after), "changes": changes})
        before = after
    return {"lines": list(numbers), "steps": found}


def _changes(before: Sequence[int], after: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """Return the changes between two texts, found apart between lines that both have once: difflib alone is slow."""
    found = []
    start = first = 0
    for end, last in [*_anchors(before, after), (len(before), len(after))]:
        if start < end or first < last:
            codes = SequenceMatcher(None, before[start:end], after[first:last], autojunk=False).get_opcodes()
            found += [(start + a, start + b, first + c, first + d) for tag, a, b, c, d in codes if tag != "equal"]
        start, first = end + 1, last + 1
    return found


def _anchors(before: Sequence[int], after: Sequence[int]) -> list[tuple[int, int]]:
    """Return where lines stand that both texts have once: as many of them as are in the same order in both."""
    places = _places_of_single(after)
    pairs = [(place, places[line]) for line, place in _places_of_single(before).items() if line in places]
    ends: list[int] = []  # of the best chain of each length, the place of its last line in the second text
    chains: list[int] = []  # of each pair, how many lines the longest chain has that ends with it
    for _, place in pairs:
        length = bisect_left(ends, place)
        ends[length : length + 1] = [place]
        chains.append(length + 1)
    chosen: list[tuple[int, int]] = []
    wanted = len(ends)
    for pair, length in zip(reversed(pairs), reversed(chains), strict=True):
        if length == wanted and (not chosen or pair[1] < chosen[-1][1]):
            chosen.append(pair)
            wanted -= 1
    return chosen[::-1]


def _places_of_single(lines: Sequence[int]) -> dict[int, int]:
    """Return the places of lines that stand once, in their order."""
    counts = Counter(lines)
    return {line: place for place, line in enumerate(lines) if counts[line] == 1}


def _runs(numbers: Sequence[int]) -> list[list[int]]:
    """Return numbers as runs of consecutive ones."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == sum(runs[-1]):
            runs[-1][1] += 1
        else:
            runs.append([number, 1])
    return runs
