"""Where the command `sparselora` begins."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line; the exit status is 0, 1 for what went wrong, 2 for a wrong command line."""
    try:
        from sparse_compile.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in ("packaging", "rich", "typer"):
            raise
        sys.exit(f"sparselora: the command line needs {error.name}: pip install 'sparse-compile[cli]'")
    app(prog_name="sparselora")
