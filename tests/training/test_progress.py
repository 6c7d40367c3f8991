"""The line that shows what a compilation is at: on a terminal alone, and gone when it is done."""

from __future__ import annotations

import io
import threading
import time
from types import SimpleNamespace

import pytest

from sparse_compile.training.news import LOG_VARIABLE
from sparse_compile.training.progress import compiling, stage


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.delenv(LOG_VARIABLE, raising=False)
    terminal = Terminal()
    # Not the module itself: pytest puts its own stream there before the test is called.
    monkeypatch.setattr("sparse_compile.training.progress.sys", SimpleNamespace(stderr=terminal))
    return terminal


def test_a_terminal_shows_the_stage_and_the_time(terminal: Terminal) -> None:
    with compiling():
        stage("pass find_ffn")
        stage("plans layers.3.mlp, site 7 of 16")
        shown = terminal.getvalue()
    assert "sparselora compiles: pass find_ffn" in shown
    assert "sparselora compiles: plans layers.3.mlp, site 7 of 16 (00:00)" in shown


def test_time_passes_while_nothing_is_said(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparse_compile.training.progress._SECONDS_BETWEEN", 0.01)
    with compiling():
        stage("forward and backward, by Inductor")
        before = len(terminal.getvalue())
        deadline = time.monotonic() + 10
        while len(terminal.getvalue()) == before:
            assert time.monotonic() < deadline, "the line is not drawn again"
            time.sleep(0.01)


@pytest.mark.parametrize("error", [False, True])
def test_afterwards_the_line_is_empty_and_no_thread_is_left(terminal: Terminal, error: bool) -> None:
    threads = threading.active_count()
    try:
        with compiling():
            stage("pass find_ffn")
            during = threading.active_count()
            if error:
                raise RuntimeError
    except RuntimeError:
        pass
    assert terminal.getvalue().rsplit("\r", 2)[-2].strip() == ""
    assert threading.active_count() < during and threading.active_count() <= threads + 1  # tqdm keeps a monitor


def test_a_graph_within_a_graph_has_no_line_of_its_own(terminal: Terminal) -> None:
    with compiling():
        shown = terminal.getvalue()
        with compiling():
            assert terminal.getvalue() == shown
        stage("pass find_ffn")
        assert terminal.getvalue() != shown


@pytest.mark.parametrize("silenced", [False, True])
def test_without_a_terminal_or_when_silenced_there_is_none(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, silenced: bool
) -> None:
    if silenced:
        monkeypatch.setenv(LOG_VARIABLE, "0")
    else:
        monkeypatch.setattr(terminal, "isatty", lambda: False)
    with compiling():
        stage("pass find_ffn")
    assert terminal.getvalue() == ""


def test_outside_of_a_compilation_a_stage_is_nobodys() -> None:
    stage("pass find_ffn")
