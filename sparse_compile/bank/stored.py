"""What a bank keeps of one adapter: its PEFT files, and a file with the counts of its data and its sketch."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparse_compile.bank.adapter import CONFIG, WEIGHTS, Adapter, open_adapter
from sparse_compile.bank.errors import BankError
from sparse_compile.bank.index import ADAPTERS, RECORD, Header, Record, digest_of, flush
from sparse_compile.bank.sketch import sketch_of

__all__ = ["DATA", "UNFINISHED", "StoredData", "open_stored", "put", "stored_data"]

DATA = "data.safetensors"
UNFINISHED = ".unfinished-"
_SKETCH = "sketch."


def put(bank: Path, header: Header, name: str, source: Adapter, counts: Tensor, provenance: str) -> Record:
    """Copy an adapter into a bank whose lock is held; return its record, for the index.

    Nothing but a folder of the bank changes, and it appears whole. What a writer left that died before it wrote the
    index is replaced if it is the same.
    """
    adapters = bank / ADAPTERS
    made = Path(tempfile.mkdtemp(dir=adapters, prefix=UNFINISHED))
    try:
        for file in (CONFIG, WEIGHTS):
            shutil.copyfile(source.folder / file, made / file)
        # The copy is what is checked: the source may be written to.
        copied = open_adapter(made)
        ids = counts.nonzero().squeeze(1)
        sketch = {f"{_SKETCH}{layer}": each.contiguous() for layer, each in sketch_of(copied).items()}
        save_file({"ids": ids, "counts": counts[ids], **sketch}, made / DATA)
        record = Record(
            name=name,
            folder=_folder_name(name, made),
            rank=copied.largest_rank,
            layers=len(copied.layers),
            tokens=int(counts.sum()),
            size=(made / WEIGHTS).stat().st_size,
            provenance=provenance,
            added=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            files={file: digest_of(made / file) for file in (CONFIG, WEIGHTS, DATA)},
            header=header,
        )
        (made / RECORD).write_text(json.dumps(dataclasses.asdict(record), indent=1) + "\n", encoding="utf-8")
        for file in (CONFIG, WEIGHTS, DATA, RECORD):
            flush(made / file)
        flush(made)
        place = adapters / record.folder
        if place.exists():
            shutil.rmtree(place)
        os.replace(made, place)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    flush(adapters)
    return record


def _folder_name(name: str, made: Path) -> str:
    return f"{name}-{digest_of(made / WEIGHTS)[:6]}{digest_of(made / DATA)[:6]}"


def open_stored(bank: Path, record: Record) -> Adapter:
    """Open an adapter of a bank.

    Raises:
        BankError: its file is gone, or has another size than it had; the message says what to do.
    """
    file = bank / ADAPTERS / record.folder / WEIGHTS
    size = file.stat().st_size if file.is_file() else None
    if size != record.size:
        found = "is not there" if size is None else f"has {size} bytes, not {record.size}"
        raise BankError(f"{file} {found}; remove the adapter {record.name!r} from the bank and add it again")
    return open_adapter(file.parent)


class StoredData:
    """The counts and sketches of some adapters of a bank, open.

    Attributes:
        ids: (v,), the tokens that occur in any of their data.
    """

    def __init__(self, files: Sequence[Any]) -> None:
        self._files = files
        self._sketched = [{key for key in file.keys() if key.startswith(_SKETCH)} for file in files]  # noqa: SIM118
        self.ids = torch.unique(torch.cat([file.get_tensor("ids") for file in files]))

    def counts(self, ids: Tensor) -> Iterator[Tensor]:
        """Yield for each adapter (v,), how often each of these tokens stands in its data; `ids` is sorted."""
        for file in self._files:
            row = torch.zeros(len(ids), dtype=torch.int64)
            row[torch.searchsorted(ids, file.get_tensor("ids"))] = file.get_tensor("counts")
            yield row

    def gram(self) -> Tensor:
        """Return (n, n) of fp64: the inner products of the adapters, by their sketches, one layer after the other."""
        gram = torch.zeros(len(self._files), len(self._files), dtype=torch.float64)
        for key in sorted(set().union(*self._sketched)):
            having = [i for i, keys in enumerate(self._sketched) if key in keys]
            sketches = torch.stack([self._files[i].get_tensor(key).flatten() for i in having]).double()
            places = torch.tensor(having)
            gram[places.unsqueeze(1), places] += sketches @ sketches.t()
        return gram


def stored_data(bank: Path, records: Sequence[Record]) -> StoredData:
    """Open the counts and sketches of some adapters of a bank.

    Raises:
        BankError: a file is gone or damaged; the message says what to do.
    """
    files = []
    for record in records:
        file = bank / ADAPTERS / record.folder / DATA
        try:
            if digest_of(file) != record.files.get(DATA):
                raise BankError("it is not what was written")
            files.append(safe_open(file, framework="pt"))
        except (OSError, SafetensorError, BankError) as error:
            raise BankError(
                f"{file} is damaged ({error}); remove the adapter {record.name!r} from the bank and add it again"
            ) from None
    return StoredData(files)
