"""Say in words that a site does not pay, and know these words again: a preset's site of this kind is no news."""

from __future__ import annotations

from typing import Final

__all__ = ["cost_note", "is_cost_note", "told_apart"]

_SAVES: Final = "saves "
_COSTS: Final = " FLOPs a token and costs the time of "


def cost_note(saved: float, spent: float) -> str:
    """Return what a site saves and costs, as the reason for which it does not pay."""
    less, more = told_apart(saved, spent)
    return f"{_SAVES}{less}{_COSTS}{more}"


def is_cost_note(reason: str) -> bool:
    """Tell whether a reason is that a site does not pay."""
    return reason.startswith(_SAVES) and _COSTS in reason


def told_apart(first: float, second: float, digits: int = 3) -> tuple[str, str]:
    """Return two numbers that are compared, with as many digits as it takes for them to differ on paper.

    Args:
        first: a number.
        second: another; an equal one is printed with `digits` too.
        digits: the fewest significant digits.
    """
    if first == second:
        return f"{first:.{digits}g}", f"{second:.{digits}g}"
    # 17 significant digits tell any two floats apart.
    pairs = ((f"{first:.{count}g}", f"{second:.{count}g}") for count in range(digits, 18))
    return next((a, b) for a, b in pairs if a != b)
