"""Where a command writes: what it found on stdout, as text or as JSON, and what it says on the way on stderr."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from typing import Any, TextIO

from rich.console import Console, RenderableType

__all__ = ["Output", "writing"]


@dataclass
class Output:
    """The two streams of a command.

    Attributes:
        stdout: where results go.
        as_json: whether they are JSON, and nothing else.
        notes: what was said on the way; it is part of the JSON.
    """

    stdout: TextIO
    as_json: bool
    notes: list[str] = field(default_factory=list)

    def note(self, message: str) -> None:
        """Say what the command chose or left out: a line on stderr."""
        self.notes.append(message)
        sys.stderr.write(f"sparselora: {message}\n")

    def result(self, data: Mapping[str, Any], text: Callable[[], str | RenderableType]) -> None:
        """Write what was found.

        Args:
            data: as plain data.
            text: makes what people read of it: a text as it is, or what rich lays out.
        """
        if self.as_json:
            self.stdout.write(json.dumps(_finite({**data, "notes": self.notes}), indent=2, allow_nan=False) + "\n")
            return
        shown = text()
        if isinstance(shown, str):
            self.stdout.write(f"{shown}\n")  # rich would break its lines at the width of the terminal
        else:
            Console(file=self.stdout, highlight=False).print(shown)


@contextmanager
def writing(*, as_json: bool) -> Iterator[Output]:
    """Give a command its streams; what libraries print meanwhile goes to stderr."""
    stdout = sys.stdout
    with redirect_stdout(sys.stderr):
        yield Output(stdout, as_json)


def _finite(value: Any) -> Any:
    """Return plain data with null for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
