"""Several processes write to a bank at once, and some are killed while they do."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest

from banks import Made, add_many, die_at
from sparse_compile.bank.adapter_bank import AdapterBank

# Each process is forked from one that has imported the package and nothing else runs in.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["safetensors.torch", "sparse_compile.bank.adapter_bank"])


class Writer:
    """A process that adds adapters.

    Attributes:
        process: it.
    """

    def __init__(self, bank: AdapterBank, base: Path, adapter: Path, name: str, count: int) -> None:
        self._go, self._done = PROCESSES.Event(), PROCESSES.RawValue("i", 0)
        arguments = (bank.folder, base, adapter, name, count, self._go, self._done)
        self.process: Any = PROCESSES.Process(target=add_many, args=arguments)
        self.process.start()

    def go(self) -> None:
        """Let it begin."""
        self._go.set()

    @property
    def done(self) -> int:
        """How many it has added."""
        return int(self._done.value)


def test_nothing_that_two_writers_add_is_lost(bank: AdapterBank, base: Path, made: Made) -> None:
    writers = [Writer(bank, base, made(seed=i), name, 8) for i, name in enumerate("xy")]
    for each in writers:
        each.go()
    while any(each.process.is_alive() for each in writers):
        bank.list()  # a reader without the lock sees a whole index at any time
        time.sleep(0.001)
    assert [each.process.exitcode for each in writers] == [0, 0]
    assert {record.name for record in bank.list()} == {f"{name}-{i}" for name in "xy" for i in range(8)}
    assert bank.check() == ()


def test_a_writer_that_is_killed_leaves_the_bank_whole(bank: AdapterBank, base: Path, made: Made) -> None:
    """What it had said it added is there; what it was at is there or not; the next writer goes on."""
    for number in range(5):
        killed = Writer(bank, base, made(seed=number), f"k{number}", 10_000)
        killed.go()
        while killed.done < 2:
            assert killed.process.is_alive()
        time.sleep(0.005 * number)  # at another point of its work each time
        killed.process.kill()
        killed.process.join()
        assert killed.process.exitcode == -9
        found = {record.name for record in bank.list()}
        own = {name for name in found if name.startswith(f"k{number}-")}
        assert {f"k{number}-{i}" for i in range(killed.done)} <= own and len(own) <= killed.done + 1
        assert all("is not in the index" in fault for fault in bank.check())
        bank.add(f"after-{number}", made(seed=99), [[2]], base=base)
        assert not list((bank.folder / "adapters").glob(".unfinished-*"))
    # What was complete but not in the index yet is taken in, and then nothing is wrong.
    before = {record.name for record in bank.list()}
    assert bank.repair() == () and bank.check() == ()
    assert before <= {record.name for record in bank.list()}


@pytest.mark.parametrize(
    "place",
    [
        "shutil.copyfile",
        "sparse_compile.bank.stored.save_file",
        "sparse_compile.bank.stored.digest_of",
        "os.replace",
        "sparse_compile.bank.index.Index.write",
    ],
)
def test_a_writer_that_dies_at_a_step_can_be_followed(bank: AdapterBank, base: Path, made: Made, place: str) -> None:
    adapter = made(seed=1)
    process = PROCESSES.Process(target=die_at, args=(place, bank.folder, base, adapter))
    process.start()
    process.join()
    assert process.exitcode == 9 and bank.list() == ()
    bank.add("a", adapter, [[1]], base=base)
    assert [record.name for record in bank.list()] == ["a"] and bank.check() == ()
