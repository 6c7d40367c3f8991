"""Several processes write to a bank at once, and some are killed while they do."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from banks import Made
from sparse_compile.bank.adapter_bank import AdapterBank

ADD = """
import itertools, sys
from sparse_compile.bank.adapter_bank import AdapterBank
folder, base, adapter, name, count = sys.argv[1:]
bank = AdapterBank(folder)
print("ready", flush=True)
sys.stdin.readline()
for i in range(int(count)):
    bank.add(f"{name}-{i}", adapter, [[1, i % 20]], base=base)
    print(i, flush=True)
"""


def writer(bank: AdapterBank, base: Path, adapter: Path, name: str, count: int) -> subprocess.Popen[str]:
    """Start a process that adds adapters once a line is written to it."""
    command = [sys.executable, "-c", ADD, str(bank.folder), str(base), str(adapter), name, str(count)]
    started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None and started.stdout.readline() == "ready\n"
    return started


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_nothing_that_two_writers_add_is_lost(bank: AdapterBank, base: Path, made: Made) -> None:
    writers = [writer(bank, base, made(seed=i), name, 15) for i, name in enumerate("xy")]
    for each in writers:
        go(each)
    while any(each.poll() is None for each in writers):
        bank.list()  # a reader without the lock sees a whole index at any time
    assert [each.wait() for each in writers] == [0, 0]
    assert {record.name for record in bank.list()} == {f"{name}-{i}" for name in "xy" for i in range(15)}
    assert bank.check() == ()


@pytest.mark.slow
def test_a_writer_that_is_killed_leaves_the_bank_whole(bank: AdapterBank, base: Path, made: Made) -> None:
    """What it had said it added is there; what it was at is there or not; the next writer goes on."""
    delays = (0.0, 0.003, 0.007, 0.013, 0.02, 0.04)
    interrupted = 0
    for number, delay in enumerate(delays):
        killed = writer(bank, base, made(seed=number), f"k{number}", 10_000)
        go(killed)
        time.sleep(delay)
        killed.kill()
        assert killed.stdout is not None
        said = killed.stdout.read().split()
        killed.wait()
        found = {record.name for record in bank.list()}
        assert {f"k{number}-{i}" for i in said} <= found
        assert len([name for name in found if name.startswith(f"k{number}-")]) <= len(said) + 1
        left = [folder for folder in (bank.folder / "adapters").iterdir() if folder.name.startswith(".unfinished-")]
        interrupted += bool(left) or bool(bank.check())
        assert all("is not in the index" in fault for fault in bank.check())
        bank.add(f"after-{number}", made(seed=99), [[2]], base=base)
        assert not list((bank.folder / "adapters").glob(".unfinished-*"))
    # What was complete but not in the index yet is taken in, and then nothing is wrong.
    before = {record.name for record in bank.list()}
    assert bank.repair() == () and bank.check() == ()
    assert before <= {record.name for record in bank.list()}


@pytest.mark.parametrize("step", ["copyfile", "save_file", "digest_of", "replace", "write"])
def test_a_writer_that_dies_at_a_step_can_be_followed(
    bank: AdapterBank, base: Path, made: Made, step: str, tmp_path: Path
) -> None:
    """It dies without a chance to clean up, as by `kill -9`, at the first call of one step."""
    places = {
        "copyfile": "shutil.copyfile",
        "save_file": "sparse_compile.bank.stored.save_file",
        "digest_of": "sparse_compile.bank.stored.digest_of",
        "replace": "os.replace",
        "write": "sparse_compile.bank.index.Index.write",
    }
    adapter = made(seed=1)
    code = f"""
import os, sys
from unittest import mock
from sparse_compile.bank.adapter_bank import AdapterBank
with mock.patch({places[step]!r}, lambda *a, **k: os._exit(9)):
    AdapterBank({str(bank.folder)!r}).add("a", {str(adapter)!r}, [[1]], base={str(base)!r})
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert bank.list() == ()
    bank.add("a", adapter, [[1]], base=base)
    assert [record.name for record in bank.list()] == ["a"] and bank.check() == ()
