"""Calibrations of the suite: by a clock that says the same every time."""

from __future__ import annotations

import pytest

from sparse_compile.calibration import costs


@pytest.fixture(autouse=True)
def steady_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a step take ten seconds, each block one for all tokens, and maps the less the narrower they are."""
    monkeypatch.setattr(costs, "step_seconds", lambda *_: 10.0)
    monkeypatch.setattr(costs, "block_seconds", lambda *_, **__: 1.0)
    monkeypatch.setattr(costs, "map_seconds", lambda surrogate, *_, **__: 0.05 + 0.002 * surrogate.rank)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that a calibration says."""
    lines: list[str] = []
    for module in ("calibrate", "fits"):
        monkeypatch.setattr(f"sparse_compile.calibration.{module}.say", lines.append)
    return lines
