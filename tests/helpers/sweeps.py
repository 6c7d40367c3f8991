"""Sweeps: tests of which `make test` runs the cases that say most, and `make test-all` all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def sweep(names: Iterable[str], *fast: str) -> list[Any]:
    """Return names as parameters of a test, all of them but `fast` marked `slow`."""
    names = list(names)
    assert fast and set(fast) <= set(names), f"of {fast} not all are among {names}"
    return [pytest.param(name, marks=[] if name in fast else [pytest.mark.slow]) for name in names]


def slow(*values: Any, id: str | None = None) -> Any:  # noqa: A002 - as pytest calls it
    """Return one case of a test, marked `slow`."""
    return pytest.param(*values, id=id, marks=pytest.mark.slow)
