"""`sparselora bank`, from an empty bank to a composed adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoints import question_rows, save_adapter, write_rows
from sparse_compile.bank.adapter_bank import AdapterBank


@pytest.fixture
def bank(run: Callable[..., Any], checkpoint: Path, rows: Path, tmp_path: Path) -> Path:
    """A bank of one adapter, made by commands."""
    folder, adapter = tmp_path / "bank", save_adapter(checkpoint, tmp_path / "adapter")
    assert run("bank", "create", folder, "--base", checkpoint).exit_code == 0
    told = run(
        "bank", "add", folder, "one", "--adapter", adapter, "--data", rows, "--base", checkpoint, "--provenance", "me"
    )
    assert told.exit_code == 0, told.stderr
    assert told.stdout.startswith("one: rank ")
    return folder


def test_an_adapter_is_listed_and_composed_of(
    run: Callable[..., Any], bank: Path, checkpoint: Path, rows: Path, tmp_path: Path
) -> None:
    (line,) = (line for line in run("bank", "list", bank).stdout.splitlines() if line.startswith("one"))
    assert line.endswith("me")
    out = tmp_path / "composed"
    told = run("bank", "compose", bank, "--data", rows, "--base", checkpoint, "--out", out, "--json")
    found = json.loads(told.stdout)
    assert told.exit_code == 0 and found["weights"] == {"one": 1.0} and found["folder"] == str(out)
    assert (out / "adapter_model.safetensors").is_file()
    text = run("bank", "compose", bank, "--data", rows, "--base", checkpoint, "--out", tmp_path / "again").stdout
    assert "one" in text and "0.0% of the sum out" in text


def test_data_are_counted_by_the_tokenizer_of_the_base(bank: Path, rows: Path, checkpoint: Path) -> None:
    from transformers import AutoTokenizer

    from sparse_compile.cli.records import example_of, read_records

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    expected = sum(len(example_of(record, tokenizer).input_ids) for record in read_records(str(rows)))
    assert AdapterBank(bank).list()[0].tokens == expected


def test_a_removed_adapter_is_gone(run: Callable[..., Any], bank: Path) -> None:
    assert run("bank", "remove", bank, "one").stdout == "one is removed\n"
    assert run("bank", "list", bank).stdout == f"{bank} is empty\n"


def test_check_and_repair(run: Callable[..., Any], bank: Path) -> None:
    assert run("bank", "check", bank).stdout == "all is well\n"
    (bank / "bank.json").write_text("{")
    checked = run("bank", "check", bank)
    assert checked.exit_code == 1 and "repair" in checked.stdout
    assert run("bank", "repair", bank).stdout == "1 adapters are in the index\n"
    assert json.loads(run("bank", "check", bank, "--json").stdout)["faults"] == []


def test_errors_are_one_line(run: Callable[..., Any], bank: Path, checkpoint: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "others.jsonl", question_rows(2))
    out = tmp_path / "out"
    for arguments, message in (
        (("list", tmp_path / "nowhere"), "no bank at"),
        (("remove", bank, "two"), "no adapter 'two'; it has one"),
        (("compose", bank, "--data", rows, "--base", checkpoint, "--out", out, "--distance", "x"), "no distance 'x'"),
        (("compose", bank, "--data", rows, "--base", checkpoint, "--out", out, "--weighting", "mlp"), "at least 4"),
    ):
        result = run("bank", *arguments)
        assert (result.exit_code, result.stdout) == (1, "")
        (line,) = result.stderr.splitlines()
        assert message in line
    assert not out.exists()
