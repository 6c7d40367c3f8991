"""The command line as a whole: help, versions, and errors that are one line on stderr."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sparse_compile
from checkpoints import save_adapter, write_rows

COMMANDS = ("explain", "calibrate", "bench", "doctor", "dump")


def error_of(result: Any, status: int = 1) -> str:
    """Return the line that a failed command wrote; there is nothing else."""
    assert (result.exit_code, result.stdout) == (status, "")
    lines = [line for line in result.stderr.splitlines() if not line.startswith("sparselora: the model has no adapter")]
    (line,) = lines
    assert line.startswith("sparselora: ")
    return line.removeprefix("sparselora: ")


def test_help_names_the_commands(run: Callable[..., Any]) -> None:
    for result in (run(), run("--help")):
        assert result.exit_code == 0 and result.stderr == ""
        assert all(name in result.stdout for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_and_json(run: Callable[..., Any], command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0 and "--json" in result.stdout


def test_the_version_is_that_of_the_distribution(run: Callable[..., Any]) -> None:
    assert run("--version").stdout == f"sparse_compile {sparse_compile.__version__}\n"


def test_python_m_is_the_same_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sparse_compile", "dump", "absent"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("sparselora: absent: no such folder")


def test_without_typer_a_line_says_what_to_install(tmp_path: Path) -> None:
    code = "import sys; sys.modules['typer'] = None; from sparse_compile.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "sparselora: the command line needs typer: pip install 'sparse-compile[cli]'\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nonsense",), "No such command 'nonsense'"),
        (("explain",), "Missing option '--model' (see sparselora explain --help)"),
        (("explain", "--model", "m", "--presets", "o1"), "No such option: --presets"),
        (("explain", "--model", "m", "--batch-size", "0"), "Invalid value for '--batch-size'"),
        (("calibrate", "--model", "m", "--data", "d"), "Missing option '--out'"),
    ],
)
def test_a_wrong_command_line_has_status_2(run: Callable[..., Any], arguments: tuple[str, ...], message: str) -> None:
    assert message in error_of(run(*arguments), status=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("explain", "--preset", "o9"), "preset must be one of 'none', 'exact', 'o1', 'o2', 'auto', got 'o9'"),
        (("explain", "--recipe", "./absent"), "absent"),
        (("explain", "--config", "absent.json"), "--config absent.json cannot be read"),
        (("explain", "--html", "page.txt"), "--html page.txt: a page is a file whose name ends in .html"),
        (("explain", "--data", "absent.jsonl"), "absent.jsonl: no such file"),
        (("explain", "--dtype", "float31"), "float31"),
        (("explain", "--targets", "nonsense_proj"), "takes no such adapter"),
        (("explain", "--adapter", "./absent"), "--adapter ./absent: no such folder"),
        (("calibrate", "--data", "absent.jsonl", "--out", "o"), "absent.jsonl: no such file"),
        (("calibrate", "--data", "d", "--out", "o", "--flops", "2"), "flops is a share of the dense step's FLOPs"),
        (("calibrate", "--data", "d", "--out", "o", "--flops", ".5", "--speedup", "2"), "give one of them"),
        (("bench", "--data", "absent.jsonl"), "absent.jsonl: no such file"),
    ],
)
def test_what_is_wrong_is_one_line(
    run: Callable[..., Any], checkpoint: Path, arguments: tuple[str, ...], message: str
) -> None:
    command, *others = arguments
    assert message in error_of(run(command, "--model", checkpoint, *others))


def test_a_model_that_is_none_is_named(run: Callable[..., Any], tmp_path: Path) -> None:
    for place, message in {
        tmp_path / "absent": "no such folder",
        tmp_path: "the folder has no config.json",
        "nobody/nothing": "transformers does not load it as a causal language model",
    }.items():
        line = error_of(run("explain", "--model", place))
        assert line.startswith(f"--model {place}: ") and message in line


def test_an_adapter_without_its_base_is_named(run: Callable[..., Any], checkpoint: Path, tmp_path: Path) -> None:
    adapter = save_adapter(checkpoint, tmp_path / "adapter")
    file = adapter / "adapter_config.json"
    file.write_text(file.read_text().replace(str(checkpoint), str(tmp_path / "gone")))
    assert f"--model {tmp_path / 'gone'}: no such folder" in error_of(run("explain", "--model", adapter))


def test_bad_rows_are_one_line(run: Callable[..., Any], checkpoint: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "bad.jsonl", ["{nonsense", {"prompt": "w1"}])
    line = error_of(run("explain", "--model", checkpoint, "--data", data))
    assert "2 bad rows" in line and "bad.jsonl:1: not JSON" in line and "bad.jsonl:2: expected" in line


def test_an_error_of_our_own_asks_for_an_issue(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("sparse_compile.cli.dump.run_dump", broken)
    line = error_of(run("dump", tmp_path))
    assert "this went wrong inside: KeyError: 'a bug'. SPARSELORA_TRACEBACK=1 shows where" in line
    monkeypatch.setenv("SPARSELORA_TRACEBACK", "1")
    assert "in broken" in run("dump", tmp_path).stderr
