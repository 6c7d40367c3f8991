"""Lines about a run are seen without any setting, and logging that is configured decides over them."""

from __future__ import annotations

import logging

import pytest
import torch

from sparse_compile.training.news import LOG_VARIABLE, say


@pytest.fixture
def unconfigured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the handlers that pytest gives to loggers, so that Python is as a user finds it."""
    monkeypatch.delenv(LOG_VARIABLE, raising=False)
    monkeypatch.setattr(logging.getLogger("sparse_compile"), "hasHandlers", lambda: False)


def test_without_any_setting_it_is_on_stderr(unconfigured: None, capsys: pytest.CaptureFixture[str]) -> None:
    say("6 of 16 sites sparse")
    assert capsys.readouterr() == ("", "sparselora: 6 of 16 sites sparse\n")


def test_a_bar_of_tqdm_is_moved_out_of_the_way(
    unconfigured: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tqdm = pytest.importorskip("tqdm")
    written: list[str] = []
    monkeypatch.setattr(tqdm.tqdm, "write", lambda line, file: written.append(line))
    say("hello")
    assert written == ["sparselora: hello"] and capsys.readouterr() == ("", "")


def test_logging_that_is_configured_decides(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    say("dropped: the root logger shows warnings alone")
    with caplog.at_level(logging.INFO):
        say("shown")
    assert [(record.name, record.message) for record in caplog.records] == [("sparse_compile", "sparselora: shown")]
    assert capsys.readouterr() == ("", "")


def test_the_level_of_the_logger_decides(
    unconfigured: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("sparse_compile")
    for level in (logging.WARNING, logging.INFO):
        monkeypatch.setattr(logger, "level", level)
        say(f"level {level}")
    assert capsys.readouterr().err == "sparselora: level 20\n"


@pytest.mark.parametrize(("setting", "shown"), [("0", ""), ("1", "sparselora: hello\n")])
def test_the_environment_variable_decides_over_both(
    setting: str,
    shown: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(LOG_VARIABLE, setting)
    with caplog.at_level(logging.INFO):
        say("hello")
    assert capsys.readouterr().err == shown and not caplog.records


def test_of_several_processes_the_first_says_it(
    unconfigured: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        say(f"rank {rank}")
    assert capsys.readouterr().err == "sparselora: rank 0\n"
