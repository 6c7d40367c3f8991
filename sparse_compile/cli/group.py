"""How every command ends: with an exit status, and where it goes wrong with one line on stderr."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any, Final, NoReturn

import torch
import typer
from typer.core import TyperGroup

from sparse_compile.cli.errors import CommandError, one_line

__all__ = ["TRACEBACK_VARIABLE", "OneLineErrors"]

TRACEBACK_VARIABLE: Final = "SPARSELORA_TRACEBACK"
"""Environment variable: `1` shows where an error was raised, above the line."""

_WRONG_COMMAND_LINE: Final[Any] = typer.BadParameter.__mro__[2]
"""What typer raises for a wrong command line, by whichever name its release has it."""

_EXPECTED: Final = (CommandError, ValueError, OSError, ImportError)
"""What this package and transformers raise with a message for the user."""


class OneLineErrors(TyperGroup):
    """A group of commands each of which says in one line what went wrong."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Run the command that the arguments name, and exit: 0, 1 for what went wrong, 2 for a wrong command line."""
        try:
            status = super().main(*args, **{**kwargs, "standalone_mode": False})
        except BrokenPipeError:
            # Who read the output wants no more of it. What is left in the buffer has nowhere to go either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except _WRONG_COMMAND_LINE as error:
            where = "sparselora" if error.ctx is None else error.ctx.command_path
            _end(f"{error.format_message().rstrip('.')} (see {where} --help)", status=2)
        except typer.Abort:
            _end("stopped", status=130)
        except Exception as error:
            _end(_message(error), status=1)
        sys.exit(status or 0)


def _message(error: Exception) -> str:
    """Return what a user is told of an error, with the way out."""
    if os.environ.get(TRACEBACK_VARIABLE) == "1":
        traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, torch.OutOfMemoryError):
        return f"the device has too little memory: give a smaller --batch-size or --max-length ({error})"
    if isinstance(error, _EXPECTED) and str(error):
        return str(error)
    return (
        f"this went wrong inside: {type(error).__name__}: {error}. {TRACEBACK_VARIABLE}=1 shows where; an issue about "
        "it needs that and the output of sparselora doctor"
    )


def _end(message: str, status: int) -> NoReturn:
    sys.stderr.write(f"sparselora: {one_line(message)}\n")
    sys.exit(status)
