"""The texts of a graph after each pass, each line stored once, with what every pass changed."""

from __future__ import annotations

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
    codes = SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    return [(start, end, first, last) for tag, start, end, first, last in codes if tag != "equal"]


def _runs(numbers: Sequence[int]) -> list[list[int]]:
    """Return numbers as runs of consecutive ones."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == sum(runs[-1]):
            runs[-1][1] += 1
        else:
            runs.append([number, 1])
    return runs
