"""What a command says when it cannot go on: one line."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

__all__ = ["CommandError", "needs", "one_line"]

_SHORTENED_TO = 500


class CommandError(Exception):
    """What the user can mend; the message says how."""


def one_line(text: str) -> str:
    """Return a message as one line of bounded length."""
    line = "; ".join(part.strip() for part in text.splitlines() if part.strip())
    return line if len(line) <= _SHORTENED_TO else f"{line[:_SHORTENED_TO]} ..."


def needs(command: str, modules: Iterable[str]) -> None:
    """Raise `CommandError` where a command lacks a package that it needs."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(f"{command} needs {' and '.join(missing)}: pip install 'sparse-compile[cli]'")
