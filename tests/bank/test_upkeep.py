"""A bank that was damaged says what is wrong, and is made whole again without losing an adapter."""

from __future__ import annotations

import json
import shutil

import pytest

from sparse_compile.bank.adapter_bank import AdapterBank
from sparse_compile.bank.errors import BankError


@pytest.mark.parametrize("damage", ["lost", "cut"])
def test_an_index_is_made_again_from_the_records(filled: AdapterBank, damage: str) -> None:
    file, before = filled.folder / "bank.json", filled.list()
    content = file.read_text()
    if damage == "lost":
        file.unlink()
    else:
        file.write_text(content[: len(content) // 2])
    (fault,) = filled.check()
    assert "bank.json" in fault and "AdapterBank.repair" in fault
    assert filled.repair() == ()
    assert filled.list() == before and filled.check() == () and file.read_text() == content
    kept = filled.folder / "bank.json.before-repair"
    assert kept.exists() == (damage == "cut")


def test_faults_of_adapters_are_named_and_left_out_of_a_repair(filled: AdapterBank) -> None:
    folders = [filled.folder / "adapters" / record.folder for record in filled.list()]
    (folders[0] / "adapter_config.json").write_text("{}")
    (folders[1] / "data.safetensors").unlink()
    shutil.copytree(folders[2], folders[2].with_name("copy"))
    (folders[3] / "record.json").write_text("{")
    faults = filled.check()
    assert len(faults) == 3
    assert "adapter_config.json is not what was written; remove the adapter 'a0'" in faults[0]
    assert "data.safetensors is not there; remove the adapter 'a1'" in faults[1]
    assert "copy is not in the index" in faults[2]
    left_out = filled.repair()
    assert [record.name for record in filled.list()] == ["a2", "a4"]
    assert len(left_out) == 4 and all(folder.exists() for folder in folders), "nothing is deleted"
    assert any("it is the record of" in each for each in left_out)


def test_an_adapter_that_the_index_lacks_is_taken_in(filled: AdapterBank) -> None:
    file, before = filled.folder / "bank.json", filled.list()
    plain = json.loads(file.read_text())
    del plain["adapters"][1]
    file.write_text(json.dumps(plain))
    (fault,) = filled.check()
    assert "a1-" in fault and "AdapterBank.repair takes it in" in fault
    filled.repair()
    assert filled.list() == before


def test_records_of_two_bases_are_not_mixed(filled: AdapterBank) -> None:
    folder = filled.folder / "adapters" / filled.list()[4].folder
    record = json.loads((folder / "record.json").read_text())
    record["header"]["base"] = "0" * 32
    (folder / "record.json").write_text(json.dumps(record))
    (left_out,) = filled.repair()
    assert "it is for another base" in left_out and len(filled.list()) == 4


def test_a_bank_of_which_nothing_is_left(bank: AdapterBank) -> None:
    (bank.folder / "bank.json").write_text("")
    with pytest.raises(BankError, match=r"no adapter with a sound record; make the bank anew"):
        bank.repair()
    assert (bank.folder / "bank.json").read_text() == ""
