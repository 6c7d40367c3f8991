"""Tell users what their run does, in lines that are seen without any setting.

Python drops info lines unless logging is configured, and neither transformers nor TRL configures it for others. So such
a line is written to stderr where nothing else would show it. Where the user (or a program around this one) has
configured logging, it is an info record of the logger `sparse_compile`, and that configuration decides.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Final

from torch import distributed

__all__ = ["LOG_VARIABLE", "is_silent", "say"]

LOG_VARIABLE: Final = "SPARSELORA_LOG"
"""Environment variable: `0` for no such line, `1` for lines on stderr however logging is configured."""

_LOGGER: Final = logging.getLogger("sparse_compile")


def say(message: str) -> None:
    """Show a line: on stderr, or as an info record where logging is configured. Of several processes the first does.

    Args:
        message: one line.
    """
    setting = os.environ.get(LOG_VARIABLE)
    if is_silent():
        return
    if setting != "1" and _LOGGER.hasHandlers():
        _LOGGER.info("sparselora: %s", message)
    elif setting == "1" or _LOGGER.level <= logging.INFO:  # the level that was set for it alone; none is 0
        _write(f"sparselora: {message}")


def is_silent() -> bool:
    """Tell whether this process says nothing: by `LOG_VARIABLE`, or because another one says it."""
    several = distributed.is_available() and distributed.is_initialized()
    return os.environ.get(LOG_VARIABLE) == "0" or (several and distributed.get_rank() != 0)


def _write(line: str) -> None:
    """Write a line to stderr, above the progress bars of tqdm where it is in use."""
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    if tqdm is None:
        sys.stderr.write(f"{line}\n")
    else:
        tqdm.write(line, file=sys.stderr)
