"""Look whether all of a bank is there, and make a lost index again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from sparse_compile.bank.errors import BankError
from sparse_compile.bank.index import ADAPTERS, INDEX, RECORD, Index, Record, digest_of
from sparse_compile.bank.stored import UNFINISHED

__all__ = ["faults", "rebuild"]


def faults(bank: Path) -> Iterator[str]:
    """Yield, in words, whatever is wrong with a bank. Every file is read whole."""
    try:
        index = Index.read(bank)
    except BankError as error:
        yield str(error)
        return
    for record in index.records.values():
        if record.header != index.header:
            yield f"{record.name} was added for {record.header.base_name}, the bank is for {index.header.base_name}"
        for name, digest in record.files.items():
            file = bank / ADAPTERS / record.folder / name
            if not file.is_file():
                yield f"{file} is not there; remove the adapter {record.name!r} and add it again"
            elif digest_of(file) != digest:
                yield f"{file} is not what was written; remove the adapter {record.name!r} and add it again"
    known = {record.folder for record in index.records.values()}
    for folder in sorted((bank / ADAPTERS).iterdir()):
        if folder.name not in known and not folder.name.startswith(UNFINISHED):
            yield f"{folder} is not in the index; AdapterBank.repair takes it in, or delete the folder"


def rebuild(bank: Path) -> tuple[Index, tuple[str, ...]]:
    """Make the index of a bank whose lock is held again, from the records beside the adapters.

    The index that was there is kept as `bank.json.before-repair`.

    Returns:
        The index, and what was left out of it, each with the reason. No folder is deleted.

    Raises:
        BankError: no adapter has a sound record, so nothing is known of the bank.
    """
    records: dict[str, Record] = {}
    left_out = []
    for folder in sorted((bank / ADAPTERS).glob("[!.]*")):
        try:
            record = Record.of(json.loads((folder / RECORD).read_text(encoding="utf-8")))
            reason = _reason(record, folder, records)
        except (OSError, ValueError, TypeError) as error:
            reason = f"its {RECORD} cannot be read ({error})"
        if reason:
            left_out.append(f"{folder}: {reason}")
        else:
            records[record.name] = record
    if not records:
        raise BankError(f"{bank / ADAPTERS} has no adapter with a sound record; make the bank anew: AdapterBank.create")
    index = Index(next(iter(records.values())).header, records)
    if (bank / INDEX).exists():
        os.replace(bank / INDEX, bank / f"{INDEX}.before-repair")
    index.write(bank)
    return index, tuple(left_out)


def _reason(record: Record, folder: Path, records: dict[str, Record]) -> str:
    """Say why a record is left out of the index, or nothing."""
    if record.folder != folder.name:
        return f"it is the record of {record.folder}"
    if record.name in records:
        return f"{records[record.name].folder} has the name {record.name!r} as well"
    if records and record.header != next(iter(records.values())).header:
        return f"it is for another base, {record.header.base_name}"
    for name, digest in record.files.items():
        if not (folder / name).is_file() or digest_of(folder / name) != digest:
            return f"{name} is not what was written"
    return ""
