"""`sparselora dump`: the pages of a folder, or its files."""

from __future__ import annotations

import json
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def dumps(tmp_path: Path) -> Path:
    """Return a folder of two graphs, of which the first has a page."""
    for graph in ("0_0", "1_0"):
        (tmp_path / graph / "kernels").mkdir(parents=True)
        for name in ("manifest.json", "00_captured.txt", "kernels/a.py"):
            (tmp_path / graph / name).write_text("")
    (tmp_path / "0_0" / "index.html").write_text("")
    return tmp_path


def test_pages_are_named_and_files_listed_where_there_is_none(run: Callable[..., Any], dumps: Path) -> None:
    result = run("dump", dumps)
    assert result.exit_code == 0 and result.stderr == ""
    assert result.stdout.splitlines() == [
        f"graph 0_0: {dumps / '0_0' / 'index.html'}",
        *(f"graph 1_0: {dumps / '1_0' / name}" for name in ("00_captured.txt", "kernels/a.py", "manifest.json")),
    ]


def test_one_graph_can_be_named(run: Callable[..., Any], dumps: Path) -> None:
    data = json.loads(run("dump", dumps / "0_0", "--json").stdout)
    (graph,) = data["graphs"]
    assert (graph["graph"], graph["pages"]) == ("0_0", [str(dumps / "0_0" / "index.html")])
    assert len(graph["files"]) == 4


def test_a_page_is_opened(run: Callable[..., Any], dumps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda address: not opened.append(address))
    assert run("dump", dumps, "--open").exit_code == 0
    assert opened == [(dumps / "0_0" / "index.html").as_uri()]
    assert "holds no page" in run("dump", dumps / "1_0", "--open").stderr
    monkeypatch.setattr(webbrowser, "open", lambda address: False)
    assert "no browser was found: open " in run("dump", dumps, "--open").stderr


def test_a_folder_without_a_dump_is_told_how_to_get_one(run: Callable[..., Any], tmp_path: Path) -> None:
    result = run("dump", tmp_path)
    assert result.exit_code == 1 and f"SPARSELORA_DUMP={tmp_path}) makes one" in result.stderr
