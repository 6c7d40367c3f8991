"""Modules that programs import from their own folder, such as those of the benchmarks."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType


@contextmanager
def imported(folder: Path, names: Collection[str]) -> Iterator[dict[str, ModuleType]]:
    """Import modules of a folder that is no package, by name; afterwards they are as if they never had been."""
    sys.path.insert(0, str(folder))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(folder))
        for name in names:
            sys.modules.pop(name, None)
