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
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_compile.predictor import store as factors
from sparse_compile.predictor import svd
from sparse_compile.predictor.published import load_upstream_factors
from sparse_compile.predictor.store import FactorStore, held_lock
from sparse_compile.predictor.svd import LowRankFactors, NonFiniteWeight, factorize
from tolerances import assert_close_rms

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def random_weight(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def low_rank_weight(out_features: int, in_features: int, rank: int, dtype: torch.dtype) -> Tensor:
    left = random_weight(out_features, rank, dtype=torch.float64)
    return (left @ random_weight(rank, in_features, dtype=torch.float64, seed=1)).to(dtype)


def product(found: LowRankFactors) -> Tensor:
    """The weight, (out, in), that the factors stand for."""
    return (found.a @ found.b).mT


def identical(left: LowRankFactors, right: LowRankFactors) -> bool:
    return torch.equal(left.a, right.a) and torch.equal(left.b, right.b)


def entries(cache: Path) -> list[Path]:
    """What a cache folder holds, beside the files that processes lock."""
    return [path for path in cache.iterdir() if path.suffix != ".lock"]


@pytest.fixture
def factorized(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The weights that were factorised, in order."""
    calls: list[Tensor] = []

    def counted(weight: Tensor, rank: int, seed: int) -> LowRankFactors:
        calls.append(weight)
        return factorize(weight, rank, seed)

    monkeypatch.setattr(factors, "factorize", counted)
    return calls


class TestFactorize:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("rank", [1, 5, 8])
    @pytest.mark.parametrize("shape", [(48, 80), (80, 48), (300, 20)])
    def test_a_weight_of_low_rank_is_reproduced(self, dtype: torch.dtype, rank: int, shape: tuple[int, int]) -> None:
        weight = low_rank_weight(*shape, rank=rank, dtype=dtype)
        found = factorize(weight, rank=8, seed=0)
        assert (found.a.shape, found.b.shape) == ((shape[1], 8), (8, shape[0]))
        assert found.a.dtype == found.b.dtype == dtype
        assert_close_rms(product(found), weight, dtype)

    @pytest.mark.parametrize("scale", [1e-12, 1e12])
    def test_small_components_of_a_low_rank_weight_survive(self, scale: float) -> None:
        left = torch.linalg.qr(random_weight(64, 8, dtype=torch.float64)).Q
        right = torch.linalg.qr(random_weight(96, 8, dtype=torch.float64, seed=1)).Q
        values = torch.logspace(0, -5, 8, dtype=torch.float64) * scale
        found = factorize((left * values) @ right.mT, rank=8, seed=0)
        torch.testing.assert_close(found.a.norm(dim=0) ** 2, values, rtol=1e-9, atol=0)

    @pytest.mark.parametrize("shape", [(3, 40), (40, 3), (1, 1), (8, 8)])
    def test_a_small_weight_is_reproduced_with_as_many_components_as_it_has(self, shape: tuple[int, int]) -> None:
        weight = random_weight(*shape)
        found = factorize(weight, rank=8, seed=0)
        assert found.rank == min(shape)
        assert_close_rms(product(found), weight)

    def test_components_are_those_of_the_full_svd(self) -> None:
        weight = random_weight(256, 128, dtype=torch.float64)
        left, values, right = torch.linalg.svd(weight.mT, full_matrices=False)
        # A spectrum that falls, so that the components are well separated.
        values = torch.arange(1, 129, dtype=torch.float64) ** -0.7
        found = factorize(((left * values) @ right).mT, rank=8, seed=0)
        singular = found.a.norm(dim=0) ** 2
        torch.testing.assert_close(singular, values[:8], rtol=1e-3, atol=0)
        torch.testing.assert_close(found.b.norm(dim=1) ** 2, singular)
        overlap = ((found.a / found.a.norm(dim=0)).mT @ left[:, :8]).diagonal().abs()
        assert overlap.min() > 0.99

    def test_approximation_is_nearly_the_best_of_its_rank(self) -> None:
        weight = random_weight(200, 100)  # a flat spectrum is the hardest
        values = torch.linalg.svdvals(weight)
        error = (product(factorize(weight, rank=8, seed=0)) - weight).norm()
        assert error <= 1.01 * values[8:].norm()

    def test_zero_weight(self) -> None:
        found = factorize(torch.zeros(32, 64), rank=8, seed=0)
        assert not product(found).any()
        assert found.a.isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_16_bit_weight_equals_its_wide_copy(self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        # Blocks of 7 rows: several, the last of them shorter.
        monkeypatch.setattr(svd, "_BLOCK_ELEMENTS", 7 * 96)
        weight = low_rank_weight(65, 96, rank=40, dtype=dtype)
        found = factorize(weight, rank=8, seed=0)
        assert found.a.dtype == torch.float32
        assert_close_rms(product(found), product(factorize(weight.float(), rank=8, seed=0)))

    def test_strides_and_gradients_do_not_matter(self) -> None:
        weight = random_weight(64, 48)
        found = factorize(nn.Parameter(weight.mT.contiguous().mT), rank=8, seed=0)
        assert not found.a.requires_grad
        assert found.b.is_contiguous()
        assert_close_rms(product(found), product(factorize(weight, rank=8, seed=0)))

    def test_same_seed_same_factors_and_the_global_generator_rests(self) -> None:
        weight = random_weight(64, 96)
        state = torch.get_rng_state()
        first = factorize(weight, rank=8, seed=3)
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(5)
        assert identical(first, factorize(weight, rank=8, seed=3))
        assert not identical(first, factorize(weight, rank=8, seed=4))

    def test_sign_does_not_depend_on_the_seed(self) -> None:
        weight = low_rank_weight(64, 96, rank=4, dtype=torch.float64)
        first, second = (factorize(weight, rank=4, seed=seed) for seed in (0, 1))
        assert_close_rms(first.a, second.a)
        assert_close_rms(first.b, second.b)

    def test_settings_of_the_caller_neither_matter_nor_change(self) -> None:
        weight = low_rank_weight(64, 96, rank=8, dtype=torch.float32)
        expected = factorize(weight, rank=8, seed=0)
        precision = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("medium")
            with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
                found = factorize(weight, rank=8, seed=0)
            assert torch.get_float32_matmul_precision() == "medium"
        finally:
            torch.set_float32_matmul_precision(precision)
        assert identical(found, expected)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_one_value_that_is_not_finite_is_found(self, dtype: torch.dtype, value: float) -> None:
        weight = random_weight(33, 47, dtype=dtype)
        weight[17, 5] = value
        with pytest.raises(NonFiniteWeight):
            factorize(weight, rank=8, seed=0)

    def test_overflow_is_not_handed_on(self) -> None:
        with pytest.raises(NonFiniteWeight, match="overflow"):
            factorize(torch.full((64, 64), 3e38), rank=8, seed=0)

    @pytest.mark.parametrize(
        ("weight", "message"),
        [
            (torch.empty(4, 4, device="meta"), "no data"),
            (torch.zeros(4), "shape"),
            (torch.zeros(2, 3, 4), "shape"),
            (torch.zeros(0, 4), "shape"),
            (torch.zeros(4, 4, dtype=torch.uint8), "dequantise"),
        ],
    )
    def test_what_has_no_factors(self, weight: Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            factorize(weight, rank=8, seed=0)

    def test_fake_weight(self) -> None:
        fake = FakeTensorMode().from_tensor(torch.zeros(4, 4))
        with pytest.raises(ValueError, match="no data"):
            factorize(fake, rank=8, seed=0)


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
        monkeypatch.setattr(factors, "ALGORITHM_VERSION", factors.ALGORITHM_VERSION + 1)
        FactorStore(tmp_path, 8, 0).get("a", weight.clone())
        assert len(factorized) == len(entries(tmp_path)) == 9

    def test_content_is_hashed_in_chunks_and_whatever_the_strides(
        self, tmp_path: Path, factorized: list[Tensor], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(factors, "_HASH_CHUNK_BYTES", 1000)
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

        monkeypatch.setattr(factors, "_content_digest", unexpected)
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
            tensors = {"a": a, "b": b, "checksum": factors._checksum(a, b)}
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
        assert factors.default_cache_dir() == tmp_path / "xdg" / "sparselora" / "factors"
        monkeypatch.setenv("XDG_CACHE_HOME", "")
        assert factors.default_cache_dir() == tmp_path / "home" / ".cache" / "sparselora" / "factors"

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


class TestUpstream:
    LAYER = "model.layers.1.mlp.gate_proj"

    @pytest.fixture
    def weight(self) -> Tensor:
        return low_rank_weight(40, 24, rank=8, dtype=torch.float32)

    @pytest.fixture
    def folder(self, tmp_path: Path, weight: Tensor) -> Path:
        """A release: w1 (in, r) and w2 (r, out), so that x @ w1 @ w2 stands for the layer."""
        left, values, right = torch.linalg.svd(weight.mT, full_matrices=False)
        root = values[:8].sqrt()
        tensors = {f"{self.LAYER}.w1": left[:, :8] * root, f"{self.LAYER}.w2": root[:, None] * right[:8]}
        tensors |= {f"model.layers.11.mlp.gate_proj.{key[-2:]}": tensor * 2 for key, tensor in tensors.items()}
        release = tmp_path / "release"
        release.mkdir()
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, release / "model.safetensors")
        return release

    @pytest.mark.parametrize(
        "name",
        [
            LAYER,
            f"{LAYER}.weight",
            f"base_model.model.{LAYER}.base_layer.weight",
            f"module.base_model.model.{LAYER}.base_layer",
            "_orig_mod.model.layers.1._orig_mod.mlp.gate_proj.weight",
        ],
    )
    def test_published_factors_win(
        self, tmp_path: Path, folder: Path, weight: Tensor, name: str, factorized: list[Tensor]
    ) -> None:
        store = FactorStore(tmp_path / "cache", 8, 0, load_upstream_factors(folder))
        assert_close_rms(product(store.get(name, weight)), weight)
        assert factorized == []
        assert not (tmp_path / "cache").exists()

    @pytest.mark.parametrize(
        "name", ["model.layers.2.mlp.gate_proj", "layers.1.mlp.gate_proj", f"{LAYER}.lora_A.default"]
    )
    def test_other_names_are_computed(
        self, tmp_path: Path, folder: Path, weight: Tensor, name: str, factorized: list[Tensor]
    ) -> None:
        FactorStore(tmp_path / "cache", 8, 0, load_upstream_factors(folder)).get(name, weight)
        assert len(factorized) == 1

    def test_file_in_place_of_the_folder_and_16_bits(self, tmp_path: Path, folder: Path, weight: Tensor) -> None:
        file = tmp_path / "factors.safetensors"
        save_file({key: t.bfloat16() for key, t in load_file(folder / "model.safetensors").items()}, file)
        published = load_upstream_factors(file)
        assert sorted(published) == ["model.layers.1.mlp.gate_proj", "model.layers.11.mlp.gate_proj"]
        found = FactorStore(tmp_path / "cache", 8, 0, published).get(self.LAYER, weight)
        assert found.a.dtype == torch.float32
        assert_close_rms(product(found), weight, torch.bfloat16)

    def test_most_specific_name_wins(self, tmp_path: Path, weight: Tensor) -> None:
        short, long = (LowRankFactors(torch.full((24, 8), x), torch.ones(8, 40)) for x in (1.0, 2.0))
        published = {"mlp.gate_proj": short, self.LAYER: long}
        assert identical(FactorStore(tmp_path, 8, 0, published).get(self.LAYER, weight), long)

    def test_nothing_is_transposed_in_silence(self, tmp_path: Path, folder: Path, weight: Tensor) -> None:
        store = FactorStore(tmp_path / "cache", 8, 0, load_upstream_factors(folder))
        with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.gate_proj\.w1 has shape \(24, 8\).*\(40, 8\)"):
            store.get(self.LAYER, weight.mT)
        with pytest.raises(ValueError, match=r"gate_proj\.w2 has shape \(8, 40\).*\(8, 41\)"):
            store.get(self.LAYER, torch.zeros(41, 24))

    @pytest.mark.parametrize(
        ("tensors", "message"),
        [
            ({}, "no predictor factors"),
            ({"up.w1": torch.ones(4, 2)}, r"up\.w1 is there, up\.w2 is missing"),
            ({"up.w2": torch.ones(2, 4)}, r"up\.w1 is missing"),
            ({"up.w1": torch.ones(4, 2), "up.w2": torch.ones(4, 2)}, r"up\.w1 and up\.w2.*\(4, 2\)"),
            ({"up.w1": torch.ones(4), "up.w2": torch.ones(2, 4)}, r"up\.w1"),
            ({"up.w1": torch.full((4, 2), torch.nan), "up.w2": torch.ones(2, 4)}, r"up\.w1 holds NaN"),
            ({"model.up_proj.weight": torch.ones(4, 4)}, r"model\.up_proj\.weight"),
            ({"w1": torch.ones(4, 2), "w2": torch.ones(2, 4)}, "w1"),
        ],
    )
    def test_other_files(self, tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            load_upstream_factors(tmp_path)

    def test_absent_and_damaged_files(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="cannot read"):
            load_upstream_factors(tmp_path)
        (tmp_path / "model.safetensors").write_bytes(b"damaged")
        with pytest.raises(ValueError, match="damaged"):
            load_upstream_factors(tmp_path)


def test_factors_must_fit_each_other() -> None:
    with pytest.raises(ValueError, match=r"\(4, 2\) and \(3, 5\)"):
        LowRankFactors(torch.ones(4, 2), torch.ones(3, 5))


# --- Several processes ------------------------------------------------------------------------------------------------


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

    monkeypatch.setattr(factors, "held_lock", lock_after_another)
    monkeypatch.setattr(factors, "factorize", None)
    found = FactorStore(tmp_path, 2, 0).get("w", weight)
    assert torch.equal(found.a, expected.a)


def test_a_weight_that_was_factorised_can_still_be_resized(tmp_path: Path) -> None:
    """FSDP2 frees and fills the storage of gathered weights."""
    weight = random_weight(6, 5)
    FactorStore(tmp_path, 2, 0).get("w", weight)
    weight.untyped_storage().resize_(0)
