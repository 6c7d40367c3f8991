"""Compare the site names that a configuration gives with the sites that a model has."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

from sparse_compile.options.presets import match_site
from sparse_compile.training.told import Told

__all__ = ["SiteNames", "check_site_names"]


class SiteNames:
    """The names that are expected in one model, and those that its graphs have.

    Args:
        told: what the model was told.

    Attributes:
        patterns: the names that are expected, as `layer_sparsity` gives them.
        names: the names of the sites that the graphs seen so far have.
        pending: whether the names are still to be compared.
        strict: whether a name that matches nothing is an error.
    """

    def __init__(self, told: Told) -> None:
        self._told = told
        self.patterns: tuple[str, ...] = ()
        self.names: dict[str, None] = {}
        self.pending = False
        self.strict = False

    def expect(self, patterns: Iterable[str]) -> None:
        """Expect other names than before."""
        patterns = tuple(dict.fromkeys(patterns))
        if patterns != self.patterns:
            self.patterns = patterns
            self.pending = bool(patterns)

    def add(self, names: Iterable[str]) -> None:
        """Add the sites of one more graph."""
        self.names.update(dict.fromkeys(names))

    def missed(self, pattern: str) -> bool:
        """Tell whether it was said of a name that it matches nothing."""
        return _missing(pattern) in self._told

    def miss(self, patterns: Iterable[str]) -> None:
        """Note that it was said of these names that they match nothing."""
        self._told.add(map(_missing, patterns))

    def absorb(self, other: SiteNames) -> None:
        """Take over names and expectations of another model, which turned out to be this one."""
        self.names.update(other.names)
        self.patterns = tuple(dict.fromkeys(self.patterns + other.patterns))
        self.pending |= other.pending


def check_site_names(parts: Sequence[SiteNames]) -> None:
    """Warn, once, of expected names that match no site.

    Args:
        parts: what is known of the parts of one model.

    Raises:
        ValueError: a part whose names were not compared before is strict, and a name matches no site.
    """
    pending = [part for part in parts if part.pending]
    names = list(dict.fromkeys(name for part in parts for name in part.names))
    unmatched: dict[str, None] = {}
    for part in pending:
        part.pending = False
        for pattern in part.patterns:
            # A part that joins later brings the same expectations again: told is told.
            told_by_another = any(other.missed(pattern) for other in parts)
            if not told_by_another and not any(match_site(pattern, name) for name in names):
                unmatched[pattern] = None
    for part in parts:
        part.miss(unmatched)
    if not unmatched:
        return
    there = ", ".join(names) if names else "none"
    wanted = ", ".join(unmatched)
    message = f"layer_sparsity or recipe: no site of this model matches {wanted}. Sites there are: {there}"
    if any(part.strict for part in pending):
        raise ValueError(message)
    warnings.warn(message, stacklevel=3)


def _missing(pattern: str) -> tuple[str, str]:
    return "no such site", pattern
