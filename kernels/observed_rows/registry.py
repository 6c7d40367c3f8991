"""Hold who wants the rows of which site: for the op that hands them on when a graph runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Final

from torch import Tensor

__all__ = ["Observer", "observer_of", "observing"]

Observer = Callable[[Tensor, Tensor], None]
"""Takes what a block reads, (n, in), and what it returns, (n, out), for n tokens. It must not keep them."""

_NOBODY: Final[Mapping[str, Observer]] = MappingProxyType({})
_OBSERVERS: Final[ContextVar[Mapping[str, Observer]]] = ContextVar("sparse_compile_observers", default=_NOBODY)


@contextmanager
def observing(observers: Mapping[str, Observer]) -> Iterator[None]:
    """Have the forwards inside the block, in this thread, hand on the rows of some sites.

    Args:
        observers: by the key of a site.
    """
    token = _OBSERVERS.set(observers)
    try:
        yield
    finally:
        _OBSERVERS.reset(token)


def observer_of(key: str) -> Observer | None:
    """Return who wants the rows of a site in this forward; None for nobody."""
    return _OBSERVERS.get().get(key)
