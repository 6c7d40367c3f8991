"""Show what a long compilation is at, in one line of the terminal that goes when it is done.

The line is a bar of tqdm, so that it stands beside a training loop's own bar and not on top of it. Where stderr is no
terminal there is none, nor with `SPARSELORA_LOG=0`.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

from tqdm import tqdm

from sparse_compile.training.news import is_silent

__all__ = ["compiling", "stage"]

_SECONDS_BETWEEN: Final = 0.5
_LINE: Final[ContextVar[tqdm[Any] | None]] = ContextVar("sparse_compile_progress", default=None)


@contextmanager
def compiling() -> Iterator[None]:
    """Show that a graph is being compiled, with the time that this has taken, while the block runs."""
    if is_silent() or not sys.stderr.isatty() or _LINE.get() is not None:
        yield
        return
    line = tqdm(desc="sparselora compiles", bar_format="{desc} ({elapsed})", leave=False, file=sys.stderr)
    done = threading.Event()
    # Inductor tells nobody how far it is: that time passes is all that there is to show meanwhile.
    clock = threading.Thread(target=_tick, args=(line, done), daemon=True)
    token = _LINE.set(line)
    clock.start()
    try:
        yield
    finally:
        _LINE.reset(token)
        done.set()
        clock.join()
        line.close()


def stage(text: str) -> None:
    """Say what the compilation is at, on its line if there is one.

    Args:
        text: a few words, such as "factors of layers.3.mlp.up_proj (4 of 32)".
    """
    line = _LINE.get()
    if line is not None:
        line.set_description_str(f"sparselora compiles: {text}")


def _tick(line: tqdm[Any], done: threading.Event) -> None:
    while not done.wait(_SECONDS_BETWEEN):
        line.refresh()
