"""What commands are run on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("typer")

from checkpoints import question_rows, save_checkpoint, write_rows


@pytest.fixture
def run() -> Callable[..., Any]:
    """Run the command line in this process; the result has `exit_code`, `stdout` and `stderr`."""
    from typer.testing import CliRunner

    from sparse_compile.cli.app import app

    def invoke(*arguments: object) -> Any:
        return CliRunner().invoke(app, [str(each) for each in arguments], prog_name="sparselora")

    return invoke


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny Llama with its tokenizer."""
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of questions with their answers."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", question_rows(16))
