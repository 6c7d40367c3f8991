"""Remember what was told, so that it is told once."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterable
from typing import Final

__all__ = ["IN_PROCESS", "Told"]


class Told:
    """The keys of messages that were given: those of one model (its session has one), or of a process."""

    def __init__(self) -> None:
        self._keys: set[Hashable] = set()
        self._lock = threading.Lock()

    def once(self, key: Hashable) -> bool:
        """Return True the first time that `key` is asked for: then the message is to be given."""
        with self._lock:
            is_first = key not in self._keys
            self._keys.add(key)
            return is_first

    def __contains__(self, key: Hashable) -> bool:
        return key in self._keys

    def add(self, keys: Iterable[Hashable]) -> None:
        """Take messages for given, of another model that turned out to be this one, say."""
        with self._lock:
            self._keys.update(keys)

    def absorb(self, other: Told) -> None:
        """Take every message of another memory for given."""
        with other._lock:
            keys = set(other._keys)
        self.add(keys)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._keys.clear()


IN_PROCESS: Final = Told()
"""What is told once in this process, by any model: for what no session can remember."""
