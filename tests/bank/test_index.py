"""The index on the disk: names, whole files, and what is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparse_compile.bank.adapter_bank import AdapterBank
from sparse_compile.bank.errors import BankError
from sparse_compile.bank.index import Index, check_name, write_file

HOSTILE = ["", ".", "..", "../x", "a/b", "/etc/passwd", "a\\b", ".hidden", "a\0b", "a\n", "-x", "ä", "x" * 65]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_that_lead_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(BankError, match="is no name for an adapter"):
        check_name(name)


@pytest.mark.parametrize("name", ["a", "E2E.pub-2_b", "9", "x" * 64])
def test_plain_names_are_taken(name: str) -> None:
    check_name(name)


def test_an_index_is_read_as_it_was_written(filled: AdapterBank) -> None:
    index = Index.read(filled.folder)
    index.write(filled.folder)
    assert Index.read(filled.folder) == index
    assert [record.name for record in filled.list()] == [f"a{i}" for i in range(5)]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    write_file(file, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_file(file, b"new")
    assert file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"format": 1}', '{"format": 1, "header": {}, "adapters": []}']
)
def test_a_damaged_index_is_named_with_the_way_out(filled: AdapterBank, content: str) -> None:
    (filled.folder / "bank.json").write_text(content)
    for call in (filled.list, lambda: filled.compose([[1]], filled.folder / "out"), lambda: filled.remove("a0")):
        with pytest.raises(BankError, match=r"bank\.json is damaged .*AdapterBank\.repair"):
            call()


def test_an_index_of_another_format_and_a_lost_one(filled: AdapterBank) -> None:
    (filled.folder / "bank.json").write_text('{"format": 99}')
    with pytest.raises(BankError, match=r"format 99.*update sparse_compile"):
        filled.list()
    (filled.folder / "bank.json").unlink()
    with pytest.raises(BankError, match=r"not there; AdapterBank\.repair"):
        filled.list()


@pytest.mark.parametrize(
    ("field", "value"),
    [("folder", "../../etc"), ("name", "a/b"), ("files", {"../x": "0"}), ("files", 3), ("rank", "8"), ("extra", 1)],
)
def test_an_index_that_leads_elsewhere_is_damaged(filled: AdapterBank, field: str, value: object) -> None:
    file = filled.folder / "bank.json"
    plain = json.loads(file.read_text())
    plain["adapters"][2][field] = value
    file.write_text(json.dumps(plain))
    with pytest.raises(BankError, match=r"bank\.json is damaged"):
        filled.list()
