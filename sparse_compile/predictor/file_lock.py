"""Let one process at a time compute what several want, without any of them having to take part."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform != "win32":
    import fcntl

__all__ = ["held_lock"]

PATIENCE_S = 600.0
"""Longest wait for another process, after which the work is done twice."""

_POLL_S = 0.02
_OFFSET_BITS = 62


@contextmanager
def held_lock(folder: Path, key: str, patience: float = PATIENCE_S) -> Iterator[None]:
    """Hold the lock of a key for the duration of the block, waiting for other processes that hold it.

    A collective operation would wait for ever where only some processes come by (one rank alone compiles again, say).
    This lock waits for nobody but its holder; the system frees it when that dies. It saves work and guards nothing:
    where it cannot be had (a folder that cannot be written, a file system without locks, no patience left), the block
    runs without it.

    Args:
        folder: where the lock file is, made if need be: one file for all keys, each of which locks a byte of it.
        key: hexadecimal digits, at least 16.
        patience: longest wait, in seconds.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "ab")  # noqa: SIM115 - closed below, which frees the lock
    except OSError:
        yield
        return
    with file:
        _acquire(file.fileno(), int(key[:16], 16) >> (64 - _OFFSET_BITS), patience)
        yield


def _acquire(descriptor: int, offset: int, patience: float) -> None:
    """Lock one byte, beyond the end of an empty file as well; Windows has no such locks."""
    if sys.platform == "win32":
        return
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, offset)
        except (BlockingIOError, PermissionError):
            if time.monotonic() >= deadline:
                return
            time.sleep(_POLL_S)
        except OSError:
            return
        else:
            return
