"""Factors are computed once: in one process, in several, and from one run to the next."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import time
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from predictor_weights import DTYPES, entries, identical, random_weight
from sparse_compile.predictor import store as store_module
from sparse_compile.predictor.store import FactorStore, held_lock
from sparse_compile.predictor.svd import NonFiniteWeight, factorize


class TestFactorStore:
    def test_second_store_reads_what_the_first_wrote(self, tmp_path: Path, factorized: list[Tensor]) -> None:
        weight = random_weight(64, 96)
        first = FactorStore(tmp_path, 8, 0).get("a", weight)
        # Another tensor of equal content: another process, or a tied weight.
        second = FactorStore(tmp_path, 8, 0).get("b", weight.clone())
        assert len(factorized) == 1
        assert identical(first, second)
        assert identical(first, factorize(weight, 8, 0))
        assert len(entries(tmp_path)) == 1

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_files_give_back_every_dtype(self, tmp_path: Path, dtype: torch.dtype, factorized: list[Tensor]) -> None:
        weight = random_weight(16, 24, dtype=dtype)
        first, second = (FactorStore(tmp_path, 8, 0).get("a", weight.clone()) for _ in range(2))
        assert len(factorized) == 1
        assert second.a.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert identical(first, second)

    def test_anything_that_the_factors_depend_on_is_another_entry(
        self, tmp_path: Path, factorized: list[Tensor], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        weight = random_weight(64, 96)
        changed = weight.clone()
        changed[63, 95] += 1e-3
        FactorStore(tmp_path, 8, 0).get("a", weight)
        for rank, seed, other in [
            (4, 0, weight.clone()),
            (8, 1, weight.clone()),
            (8, 0, changed),
            (8, 0, weight.reshape(96, 64)),
            (8, 0, weight.double()),
            # Equal bytes, other numbers.
            (8, 0, weight.bfloat16()),
            (8, 0, weight.bfloat16().view(torch.float16).nan_to_num(0, 0, 0)),
        ]:
            FactorStore(tmp_path, rank, seed).get("a", other)
        monkeypatch.setattr(store_module, "ALGORITHM_VERSION", store_module.ALGORITHM_VERSION + 1)
        FactorStore(tmp_path, 8, 0).get("a", weight.clone())
        assert len(factorized) == len(entries(tmp_path)) == 9

    def test_content_is_hashed_in_chunks_and_whatever_the_strides(
        self, tmp_path: Path, factorized: list[Tensor], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(store_module, "_HASH_CHUNK_BYTES", 1000)
        weight = random_weight(64, 96)
        FactorStore(tmp_path, 8, 0).get("a", weight)
        FactorStore(tmp_path, 8, 0).get("a", weight.mT.contiguous().mT)
        assert len(factorized) == 1
        FactorStore(tmp_path, 8, 0).get("a", weight.flip(0))
        assert len(factorized) == 2

    def test_recompilation_does_not_hash_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        weight = nn.Parameter(random_weight(64, 96))
        first = FactorStore(tmp_path, 8, 0).get("a", weight)

        def unexpected(*_: object) -> str:
            raise AssertionError("hashed again")

        monkeypatch.setattr(store_module, "_content_digest", unexpected)
        assert identical(FactorStore(tmp_path, 8, 0).get("a", weight), first)
        with pytest.raises(AssertionError, match="hashed again"):
            FactorStore(tmp_path, 4, 0).get("a", weight)

    @pytest.mark.parametrize("through_data", [False, True])
    def test_weight_changed_in_place_is_factorised_anew(
        self, tmp_path: Path, factorized: list[Tensor], through_data: bool
    ) -> None:
        weight = nn.Parameter(random_weight(64, 96))
        store = FactorStore(tmp_path, 8, 0)
        before = store.get("a", weight)
        if through_data:
            weight.data += 1  # as PEFT merges an adapter; the version counter stays
        else:
            with torch.no_grad():
                weight.add_(1)
        assert not identical(store.get("a", weight), before)
        assert len(factorized) == 2

    def test_nothing_keeps_the_weight_alive(self, tmp_path: Path) -> None:
        weight = nn.Parameter(random_weight(16, 24))
        alive = weakref.ref(weight)
        store = FactorStore(tmp_path, 8, 0)
        store.get("a", weight)
        del weight
        gc.collect()
        assert alive() is None

    @pytest.mark.parametrize(
        "damage", ["empty", "truncated", "garbage", "bit", "shape", "nan", "dtype", "keys", "folder"]
    )
    def test_damaged_file_is_computed_anew_and_replaced(
        self, tmp_path: Path, factorized: list[Tensor], damage: str
    ) -> None:
        weight = random_weight(64, 96)
        expected = FactorStore(tmp_path, 8, 0).get("a", weight)
        (path,) = entries(tmp_path)
        sound = path.read_bytes()
        tensors = load_file(path)
        if damage == "empty":
            path.write_bytes(b"")
        elif damage == "truncated":
            path.write_bytes(sound[: len(sound) // 2])
        elif damage == "garbage":
            path.write_bytes(b"\xff" * len(sound))
        elif damage == "bit":
            path.write_bytes(sound[:-100] + bytes([sound[-100] ^ 1]) + sound[-99:])
        elif damage == "folder":
            path.unlink()
            path.mkdir()
        else:
            a, b = tensors["a"], tensors["b"]
            if damage == "shape":
                a = a[:-1].contiguous()
            elif damage == "nan":
                a[0, 0] = float("nan")
            elif damage == "dtype":
                a, b = a.half(), b.half()
            tensors = {"a": a, "b": b, "checksum": store_module._checksum(a, b)}
            save_file({"a": a} if damage == "keys" else tensors, path)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = FactorStore(tmp_path, 8, 0).get("a", weight.clone())
        assert identical(found, expected)
        assert len(factorized) == 2
        # A folder in the file's place cannot be replaced: that is said, and the factors are good all the same.
        assert len(caught) == (damage == "folder")
        if damage != "folder":
            assert path.read_bytes() == sound
            FactorStore(tmp_path, 8, 0).get("a", weight.clone())
            assert len(factorized) == 2
        assert [entry.name for entry in entries(tmp_path)] == [path.name]

    def test_folder_that_cannot_be_written_is_one_warning(self, tmp_path: Path, factorized: list[Tensor]) -> None:
        blocked = tmp_path / "file"
        blocked.touch()
        store = FactorStore(blocked / "cache", 8, 0)
        with pytest.warns(RuntimeWarning, match="SPARSELORA_CACHE_DIR") as caught:
            found = [store.get(str(seed), random_weight(16, 24, seed=seed)) for seed in range(3)]
        assert len(caught) == 1
        assert len(factorized) == 3
        assert identical(found[0], factorize(random_weight(16, 24), 8, 0))

    def test_default_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SPARSELORA_CACHE_DIR", str(tmp_path / "own"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        FactorStore(None, 8, 0).get("a", random_weight(16, 24))
        assert len(entries(tmp_path / "own")) == 1
        monkeypatch.setenv("SPARSELORA_CACHE_DIR", "")
        assert store_module.default_cache_dir() == tmp_path / "xdg" / "sparselora" / "factors"
        monkeypatch.setenv("XDG_CACHE_HOME", "")
        assert store_module.default_cache_dir() == tmp_path / "home" / ".cache" / "sparselora" / "factors"

    def test_errors_name_the_weight(self, tmp_path: Path) -> None:
        store = FactorStore(tmp_path, 8, 0)
        weight = random_weight(16, 24)
        weight[3, 4] = float("nan")
        with pytest.raises(NonFiniteWeight, match=r"layers\.3\.mlp\.up_proj"):
            store.get("layers.3.mlp.up_proj", weight)
        with pytest.raises(ValueError, match=r"layers\.3\.mlp\.up_proj.*no data"):
            store.get("layers.3.mlp.up_proj", weight.to("meta"))
        assert entries(tmp_path) == []


CHILD = """
import sys, time, torch
from pathlib import Path
from sparse_compile.predictor.store import FactorStore, held_lock
cache, ready, go = map(Path, sys.argv[1:])
weights = [torch.randn(64, 96, generator=torch.Generator().manual_seed(seed)) for seed in range(12)]
ready.touch()
while not go.exists():
    time.sleep(0.001)
for weight in weights:
    FactorStore(cache, 8, 0).get("w", weight)
"""


@pytest.mark.slow
def test_processes_that_write_at_once_agree(tmp_path: Path, factorized: list[Tensor]) -> None:
    cache, go = tmp_path / "cache", tmp_path / "go"
    ready = [tmp_path / f"ready{i}" for i in range(2)]
    # Sums in another number of threads round otherwise.
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    commands = [[sys.executable, "-c", CHILD, str(cache), str(flag), str(go)] for flag in ready]
    children = [subprocess.Popen(command, env=environment) for command in commands]
    while not all(flag.exists() for flag in ready):
        assert all(child.poll() is None for child in children)
        time.sleep(0.01)
    go.touch()
    assert [child.wait(timeout=120) for child in children] == [0, 0]
    assert len(entries(cache)) == 12
    for seed in range(12):
        weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(seed))
        assert identical(FactorStore(cache, 8, 0).get("w", weight), factorize(weight, 8, 0))
    # What the two wrote is what this process would have computed, and all of it was taken from their files.
    assert factorized == []


def test_a_lock_is_held_by_one_process_at_a_time_and_patience_ends(tmp_path: Path) -> None:
    file, other = tmp_path / "one.lock", tmp_path / "other.lock"
    code = (
        "import time; from pathlib import Path; from sparse_compile.predictor.store import held_lock\n"
        f"with held_lock(Path({str(file)!r})): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        start = time.monotonic()
        with held_lock(other):
            pass
        with held_lock(file, patience=0.2):
            waited = time.monotonic() - start
    finally:
        holder.kill()
        holder.wait()
    assert 0.2 <= waited < 30
    with held_lock(file):  # the system freed it
        pass


def test_a_folder_that_cannot_be_made_needs_no_lock(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with held_lock(tmp_path / "file" / "folder" / "one.lock"):
        pass


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EROFS])
def test_a_file_system_without_locks_needs_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder, code: int
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    for _ in range(2):
        with held_lock(tmp_path / "one.lock"):
            pass
    assert not recwarn.list


def test_an_error_under_the_lock_is_the_callers_and_frees_it(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="of the block"), held_lock(tmp_path / "one.lock"):
        raise OSError("of the block")
    start = time.monotonic()
    with held_lock(tmp_path / "one.lock", patience=10):
        assert time.monotonic() - start < 5


def test_what_another_process_wrote_meanwhile_is_read_not_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = random_weight(6, 5)
    expected = FactorStore(tmp_path, 2, 0).get("w", weight.clone())
    (written,) = entries(tmp_path)
    content = written.read_bytes()
    written.unlink()

    @contextmanager
    def lock_after_another(file: Path) -> Iterator[None]:
        written.write_bytes(content)
        yield

    monkeypatch.setattr(store_module, "held_lock", lock_after_another)
    monkeypatch.setattr(store_module, "factorize", None)
    found = FactorStore(tmp_path, 2, 0).get("w", weight)
    assert torch.equal(found.a, expected.a)


def test_a_weight_that_was_factorised_can_still_be_resized(tmp_path: Path) -> None:
    """FSDP2 frees and fills the storage of gathered weights."""
    weight = random_weight(6, 5)
    FactorStore(tmp_path, 2, 0).get("w", weight)
    weight.untyped_storage().resize_(0)
