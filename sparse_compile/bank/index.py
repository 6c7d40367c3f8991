"""The index of a bank: one JSON file that is always whole, and is made again from the adapters' own records.

    bank.json                  which base, and a record of each adapter
    .lock                      held by who writes
    ground.safetensors         where the base's tokens lie
    adapters/NAME-DIGEST/      a PEFT adapter, data.safetensors (token counts, sketch) and record.json, its record
    adapters/.unfinished-*     what a killed writer leaves; the next writer removes it

A file is written beside its place, flushed to the disk, and renamed. A folder is, too. So a reader needs no lock, and
whoever is killed at any point leaves the bank as it was before or as it is after.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_compile.bank.errors import BankError

__all__ = ["ADAPTERS", "INDEX", "RECORD", "Header", "Index", "Record", "check_name", "digest_of", "flush", "write_file"]

INDEX, ADAPTERS, RECORD = "bank.json", "adapters", "record.json"
_FORMAT = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
_LONGEST_NAME = 64
"""The name of a folder adds a digest to it."""
_CHUNK = 2**24


@dataclass(frozen=True)
class Header:
    """The base that all adapters of a bank change.

    Attributes:
        base: its fingerprint.
        base_name: of its folder.
        vocabulary: tokens.
    """

    base: str
    base_name: str
    vocabulary: int


@dataclass(frozen=True)
class Record:
    """One adapter of a bank.

    Attributes:
        name: by which it is known.
        folder: in `adapters`.
        rank: the largest of its layers.
        layers: how many linear layers it changes.
        tokens: of its data.
        size: bytes of its factors.
        provenance: where it comes from, in the words of who added it.
        added: when, in UTC.
        files: BLAKE2 digest of each of its files.
        header: of the bank; it makes a lost index whole again.
    """

    name: str
    folder: str
    rank: int
    layers: int
    tokens: int
    size: int
    provenance: str
    added: str
    files: Mapping[str, str]
    header: Header

    @classmethod
    def of(cls, plain: Any) -> Record:
        """Read a record from plain data.

        Raises:
            ValueError: it is none, or it names a file outside of its folder.
        """
        if not isinstance(plain, dict) or plain.keys() != {each.name for each in dataclasses.fields(cls)}:
            raise ValueError("it has other fields than a record")
        record = cls(**{**plain, "header": _header(plain["header"])})
        numbers = (record.rank, record.layers, record.tokens, record.size)
        words = (record.name, record.folder, record.provenance, record.added)
        if not all(isinstance(each, int) for each in numbers) or not all(isinstance(each, str) for each in words):
            raise ValueError("a field has another kind than a record's")
        if not isinstance(record.files, dict):
            raise ValueError("its files are no table")
        for each in (record.name, record.folder, *record.files):
            if not _NAME.fullmatch(each):
                raise ValueError(f"{each!r} is no name of a file")
        return record


@dataclass(frozen=True)
class Index:
    """All of `bank.json`."""

    header: Header
    records: Mapping[str, Record]

    @classmethod
    def read(cls, folder: Path) -> Index:
        """Read the index of a bank.

        Raises:
            BankError: there is none, or it is damaged; nothing of the adapters is lost then.
        """
        file = folder / INDEX
        try:
            plain = json.loads(file.read_text(encoding="utf-8"))
            if plain["format"] != _FORMAT:
                raise BankError(
                    f"{file} has format {plain['format']}, this version reads {_FORMAT}; update sparse_compile"
                )
            records = [Record.of(each) for each in plain["adapters"]]
            return cls(_header(plain["header"]), {each.name: each for each in records})
        except FileNotFoundError:
            way = "AdapterBank.repair" if (folder / ADAPTERS).is_dir() else "AdapterBank.create"
            raise BankError(f"{file} is not there; {way} makes it") from None
        except OSError as error:
            raise BankError(f"{file} cannot be read ({error.strerror})") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, BankError):
                raise
            reason = f"{type(error).__name__}: {error}"
            raise BankError(
                f"{file} is damaged ({reason}); the adapters are there: AdapterBank.repair makes it again"
            ) from None

    def write(self, folder: Path) -> None:
        """Put this index in the place of the one that is there, at once; the writer holds the lock."""
        plain = {
            "format": _FORMAT,
            "header": dataclasses.asdict(self.header),
            "adapters": [dataclasses.asdict(self.records[name]) for name in sorted(self.records)],
        }
        write_file(folder / INDEX, (json.dumps(plain, indent=1) + "\n").encode())


def _header(plain: Any) -> Header:
    header = Header(**plain)
    if not (isinstance(header.base, str) and isinstance(header.base_name, str) and isinstance(header.vocabulary, int)):
        raise ValueError("the header has other kinds of fields")
    return header


def check_name(name: str) -> None:
    """Check the name of an adapter.

    Raises:
        BankError: it could not be the name of a folder, or it leads elsewhere.
    """
    if len(name) > _LONGEST_NAME or not _NAME.fullmatch(name):
        raise BankError(
            f"{name!r} is no name for an adapter: take up to {_LONGEST_NAME} letters, digits, '.', '_' and '-', "
            "the first of them a letter or a digit"
        )


def write_file(file: Path, content: bytes) -> None:
    """Write a file whole or not at all, and to the disk."""
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise
    flush(file.parent)


def flush(folder: Path) -> None:
    """Have the disk hold what was renamed in a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest_of(file: Path) -> str:
    """Return the BLAKE2 digest of a file."""
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
