"""A tiny base model, adapters for it, and a bank of some."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from banks import Made, write_adapter, write_base
from sparse_compile.bank.adapter_bank import AdapterBank


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", 0)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """Write adapters, each into a folder of its own."""

    def make(**arguments: Any) -> Path:
        return write_adapter(tmp_path / f"adapter-{len(list(tmp_path.glob('adapter-*')))}", **arguments)

    return make


@pytest.fixture
def bank(tmp_path: Path, base: Path) -> AdapterBank:
    return AdapterBank.create(tmp_path / "bank", base)


@pytest.fixture
def filled(bank: AdapterBank, base: Path, made: Made) -> AdapterBank:
    """A bank of five: the data of adapter i are about token 3 i."""
    for i in range(5):
        bank.add(f"a{i}", made(seed=i), [[3 * i] * 4 + [3 * i + 1]], base=base, provenance=f"seed {i}")
    return bank
