"""`AdapterBank`: a folder of trained adapters of one base model."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparse_compile.bank.adapter import Adapter, open_adapter
from sparse_compile.bank.base import Base, read_base
from sparse_compile.bank.compose import Composition, compose_adapter
from sparse_compile.bank.distances import ON_EMBEDDINGS, distances
from sparse_compile.bank.errors import BankError
from sparse_compile.bank.index import ADAPTERS, Header, Index, Record, check_name
from sparse_compile.bank.stored import UNFINISHED, open_stored, put, stored_data
from sparse_compile.bank.tokens import Data, count_tokens
from sparse_compile.bank.upkeep import faults, rebuild
from sparse_compile.bank.weighting import weigh

__all__ = ["AdapterBank", "Neighbours"]

PATIENCE_S = 600.0
"""Longest wait for another writer, in seconds: adding an adapter takes seconds."""

_LOCK, _GROUND = ".lock", "ground.safetensors"
_DISTANCE, _WEIGHTING = "jensen_shannon", "standardised"
"""What the paper found best; `docs/adapter_bank.md` has what the others give."""


@dataclass(frozen=True)
class Neighbours:
    """The adapters of a bank, as seen from new data.

    Attributes:
        distances: of the new data to those of each adapter, by name.
        weights: of each adapter; their sum is 1.
        temperature: T of the softmin; None for a network.
        error: mean error of these weights on the bank itself, by leave-one-out; None where it was not computed.
    """

    distances: Mapping[str, float]
    weights: Mapping[str, float]
    temperature: float | None
    error: float | None


class AdapterBank:
    """A folder of LoRA adapters of one base model, from which one for new data is composed (arXiv 2507.01806).

    Any number of processes may use a bank at once: writers wait for each other, and readers see a bank before or after
    a change. Nothing is pickled.

    Args:
        folder: of a bank, which `create` made.

    Raises:
        BankError: it is no folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise BankError(f"there is no bank at {self.folder}; AdapterBank.create makes one")

    @classmethod
    def create(cls, folder: str | os.PathLike[str], base: str | os.PathLike[str]) -> AdapterBank:
        """Make an empty bank.

        Args:
            folder: where; it must be empty, or not there.
            base: folder of the model whose adapters it is for.

        Raises:
            BankError: the folder holds something, or the base cannot be read.
        """
        place, model = Path(folder), read_base(Path(base), ground=True)
        place.mkdir(parents=True, exist_ok=True)
        bank = cls(place)
        with bank._lock():
            if any(each.name != _LOCK for each in place.iterdir()):
                raise BankError(f"{place} is not empty; name a new folder")
            (place / ADAPTERS).mkdir()
            if model.points is not None:
                save_file({"points": model.points}, place / _GROUND)
            # Last: with it the bank is there.
            Index(Header(model.fingerprint, model.name, model.vocabulary), {}).write(place)
        return bank

    @property
    def header(self) -> Header:
        """The base of the bank."""
        return Index.read(self.folder).header

    def list(self) -> tuple[Record, ...]:
        """Return the record of each adapter, by name."""
        return tuple(Index.read(self.folder).records.values())

    def add(
        self,
        name: str,
        adapter: str | os.PathLike[str],
        data: Data,
        *,
        base: str | os.PathLike[str],
        provenance: str = "",
    ) -> Record:
        """Copy an adapter into the bank, with the token counts of the data that it was trained on.

        Args:
            name: up to 64 letters, digits, `.`, `_` and `-`.
            adapter: folder that `PeftModel.save_pretrained` wrote.
            data: what it was trained on: sequences of token ids, tensors, or batches with `input_ids`.
            base: folder of the model that it was trained on.
            provenance: where it comes from, for those who read the list.

        Raises:
            BankError: it is no plain LoRA adapter of linear layers, its base is another one, the name is taken or is
                none, or the data have no token of the base. The bank is as it was then.
        """
        check_name(name)
        header, model, source = self.header, read_base(Path(base)), open_adapter(Path(adapter))
        _check_base(header, model, source)
        counts = count_tokens(data, header.vocabulary)
        with self._writing() as index:
            if name in index.records:
                raise BankError(f"the bank has an adapter {name!r}; remove it first, or take another name")
            record = put(self.folder, index.header, name, source, counts, provenance)
            replace(index, records={**index.records, name: record}).write(self.folder)
        return record

    def remove(self, name: str) -> None:
        """Take an adapter out of the bank and delete its copy.

        Raises:
            BankError: the bank has none of this name.
        """
        with self._writing() as index:
            record = _named(index, name)
            replace(index, records={key: each for key, each in index.records.items() if key != name}).write(self.folder)
            gone = tempfile.mkdtemp(dir=self.folder / ADAPTERS, prefix=UNFINISHED)
            if (self.folder / ADAPTERS / record.folder).exists():
                os.replace(self.folder / ADAPTERS / record.folder, gone)
            shutil.rmtree(gone)

    def check(self) -> tuple[str, ...]:
        """Read all of the bank; return what is wrong with it, each with the way out."""
        return tuple(faults(self.folder))

    def repair(self) -> tuple[str, ...]:
        """Make the index again from the records beside the adapters; return the folders left out, with the reasons.

        No folder is deleted, and the old index is kept as `bank.json.before-repair`.

        Raises:
            BankError: no adapter has a sound record.
        """
        with self._lock():
            return rebuild(self.folder)[1]

    def neighbours(
        self,
        data: Data,
        *,
        distance: str = _DISTANCE,
        weighting: str = _WEIGHTING,
        temperature: float | None = None,
        without: Collection[str] = (),
    ) -> Neighbours:
        """Weigh the adapters of the bank for new data; see `compose` for the arguments and errors."""
        index = Index.read(self.folder)
        for name in without:
            _named(index, name)
        records = [record for name, record in index.records.items() if name not in without]
        if not records:
            raise BankError(f"the bank {self.folder} has no adapter to compose of; add one")
        stored = stored_data(self.folder, records)
        new = count_tokens(data, index.header.vocabulary)
        ids = torch.unique(torch.cat((stored.ids, new.nonzero().squeeze(1))))
        shares = torch.empty(len(records) + 1, len(ids))
        for row, counts in zip(shares, itertools.chain(stored.counts(ids), [new[ids]]), strict=True):
            row.copy_(counts / counts.sum())
        points = self._points() if distance in ON_EMBEDDINGS else None
        found = distances(distance, shares, ids, points)
        # The new data come last. KL is from the new data to those of the bank.
        own, between = found[-1, :-1], found[:-1, :-1]
        weights = weigh(weighting, own, between, stored.gram, temperature)
        names = [record.name for record in records]
        return Neighbours(
            dict(zip(names, own.tolist(), strict=True)),
            dict(zip(names, weights.values.tolist(), strict=True)),
            weights.temperature,
            weights.error,
        )

    def compose(
        self,
        data: Data,
        out: str | os.PathLike[str],
        *,
        rank: int | None = None,
        distance: str = _DISTANCE,
        weighting: str = _WEIGHTING,
        temperature: float | None = None,
        without: Collection[str] = (),
        progress: bool = True,
    ) -> Composition:
        """Compose an adapter for new data of the bank's adapters, weighted by how near their data are.

        No gradient of the base is taken, and the base is not loaded. The adapter is
        `sum_i w_i s_i B_i A_i` at each layer, as the best product B A of the rank.

        Args:
            data: as in `add`.
            out: folder to write, which is not there yet. `PeftModel.from_pretrained` loads it.
            rank: of the result; None takes the largest of the bank.
            distance: `"jensen_shannon"`, `"kl"`, `"mmd"`, `"wasserstein"` or `"wasserstein_ids"`.
            weighting: `"standardised"`, `"softmin"` or `"mlp"`.
            temperature: of the softmin, in units of the distance, or of its deviation where it is standardised; None
                chooses it by leave-one-out on the bank.
            without: names of adapters to leave out.
            progress: show a bar.

        Raises:
            BankError: an argument is wrong, the bank is empty or damaged, or its adapters do not fit together.
        """
        near = self.neighbours(data, distance=distance, weighting=weighting, temperature=temperature, without=without)
        return self.combine(near, out, rank=rank, progress=progress)

    def combine(
        self,
        weights: Neighbours | Mapping[str, float],
        out: str | os.PathLike[str],
        *,
        rank: int | None = None,
        progress: bool = True,
    ) -> Composition:
        """Compose an adapter with given weights, by name, or with those that `neighbours` found.

        Raises:
            BankError: as `compose`.
        """
        given = weights.weights if isinstance(weights, Neighbours) else weights
        index = Index.read(self.folder)
        adapters = {name: open_stored(self.folder, _named(index, name)) for name, weight in given.items() if weight}
        found = compose_adapter(adapters, given, Path(out), rank, progress=progress)
        if isinstance(weights, Neighbours):
            return replace(found, temperature=weights.temperature, bank_error=weights.error)
        return found

    def _points(self) -> Tensor | None:
        file = self.folder / _GROUND
        try:
            return load_file(file)["points"] if file.exists() else None
        except (OSError, SafetensorError, KeyError) as error:
            raise BankError(f"{file} is damaged ({error}); copy it from a new bank of the same base") from None

    @contextmanager
    def _writing(self) -> Iterator[Index]:
        """Hold the lock, and yield the index as the last writer left it."""
        with self._lock():
            index = Index.read(self.folder)
            # Nobody else writes now, so whoever began these is dead.
            for left in (self.folder / ADAPTERS).glob(f"{UNFINISHED}*"):
                shutil.rmtree(left, ignore_errors=True)
            yield index

    @contextmanager
    def _lock(self) -> Iterator[None]:
        # The system frees it when its holder dies; a lock file that merely exists would outlive it.
        lock = FileLock(self.folder / _LOCK, timeout=PATIENCE_S, fallback_to_soft=False)
        try:
            lock.acquire()
        except Timeout:
            raise BankError(
                f"{self.folder} has been written to for {PATIENCE_S:.0f} s; end the other process"
            ) from None
        except OSError as error:
            raise BankError(
                f"{self.folder} cannot be locked ({error}); it must be writable, on a disk with locks"
            ) from None
        try:
            yield
        finally:
            lock.release()


def _named(index: Index, name: str) -> Record:
    if name not in index.records:
        raise BankError(f"the bank has no adapter {name!r}; it has {', '.join(index.records) or 'none'}")
    return index.records[name]


def _check_base(header: Header, model: Base, adapter: Adapter) -> None:
    if model.fingerprint != header.base:
        raise BankError(
            f"{model.name} ({model.fingerprint[:8]}) is not the bank's, {header.base_name} ({header.base[:8]}); "
            "an adapter changes the weights that it was trained on: make a bank of that base"
        )
    for path, layer in adapter.layers.items():
        expected = model.shapes.get(path)
        sizes = (layer.outputs, layer.inputs)
        if expected is not None and sizes not in (expected, expected[::-1]):
            raise BankError(
                f"{adapter.folder}: {path} is {sizes}, in the base {expected}; it was trained on another base"
            )
