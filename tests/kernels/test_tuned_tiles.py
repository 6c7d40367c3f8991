"""Tables of tuned tiles and the program that writes them, as far as both can be had without a GPU."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pickle
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from sparse_compile.kernels.fused_linear import tuned
from sparse_compile.kernels.fused_linear.tiles import Problem, Tile, choose_tile
from sparse_compile.torch_private.sources import hash_of_folders

triton = pytest.importorskip("triton", reason="needs triton, for its compiler")

H100 = (9, 0)
PRODUCT = Problem(4096, 256, 4096, 2, H100, products=2)
TILE = Tile(64, 128, 32, 8, 3)
ORIGIN = {
    "device": "NVIDIA H100",
    "versions": {"triton": triton.__version__},
    "date": "2026-01-01T00:00:00+00:00",
    "commit": {"revision": "0" * 40, "dirty": False},
    "command": "benchmarks/tune.py",
}


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Write a good table where the kernels look for that of an H100."""
    path = tmp_path / "configs" / "sm_90.json"
    monkeypatch.setattr(tuned, "table_path", lambda capability: path)
    entry = tuned.Entry(PRODUCT, TILE, 1e-4, 2e-4)
    tuned.write_table(tuned.TunedTable(H100, ORIGIN, (entry,), tuned.sources_hash()), path)
    tuned.tuned_tiles.cache_clear()
    yield path
    tuned.tuned_tiles.cache_clear()


def test_an_entry_serves_the_sizes_between_two_powers_of_two(table: Path) -> None:
    asked = Problem(3064, 143, 4096, 2, H100, products=2)
    assert tuned.tile_for(asked) == TILE != choose_tile(asked)
    assert json.loads(table.read_text())["provenance"] == ORIGIN
    for other in (
        dataclasses.replace(asked, rows=2048),
        dataclasses.replace(asked, columns=257),
        dataclasses.replace(asked, itemsize=4),
        dataclasses.replace(asked, products=1),
        dataclasses.replace(asked, kernel="gradients"),
    ):
        assert tuned.tile_for(other) == choose_tile(other)


def test_packing_follows_from_the_sizes_of_a_call(table: Path) -> None:
    scattered = dataclasses.replace(PRODUCT, scattered=True)
    content = tuned.read_table(table, H100)
    tuned.write_table(
        dataclasses.replace(content, entries=(dataclasses.replace(content.entries[0], problem=scattered),)), table
    )
    assert tuned.tile_for(dataclasses.replace(scattered, rows=3000)).pack
    assert not tuned.tile_for(PRODUCT).pack


def test_without_a_table_sizes_decide(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuned.tuned_tiles.cache_clear()
        assert tuned.tile_for(dataclasses.replace(PRODUCT, capability=(7, 7))) == choose_tile(
            dataclasses.replace(PRODUCT, capability=(7, 7))
        )


def _entry(name: str, part: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content["entries"][0][part].update({name: value})


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda content: content.update(format=0), "not of format 1"),
        (lambda content: content.update(arch="sm_80"), "for 'sm_80', not for 'sm_90'"),
        (lambda content: content["provenance"].pop("device"), "provenance has no device"),
        (lambda content: content.update(sources="0"), "the kernels have changed"),
        (lambda content: content["provenance"]["versions"].update(triton="2.1.0"), "measured with triton 2.1.0"),
        (lambda content: content.update(entries=None), "no list of entries"),
        (lambda content: content["entries"].append(content["entries"][0]), "two entries are for one problem"),
        (lambda content: content["entries"][0].update(seconds="fast"), "entry 0: seconds is 'fast'"),
        (_entry("m", "tile", 48), "entry 0: a tile of 48 x 128 x 32"),
        (_entry("m", "tile", "64"), "entry 0: m is '64'"),
        (_entry("warps", "tile", 3), "3 warps"),
        (_entry("n", "tile", 2048), "bytes of shared memory exceed"),
        (_entry("speed", "tile", 1), "tile has not the fields"),
        (_entry("rows", "problem", 3064), "no powers of two"),
        (_entry("kernel", "problem", "conv"), "no kernel 'conv'"),
    ],
)
def test_a_bad_or_stale_table_is_left_out_with_one_warning(
    table: Path, spoil: Callable[[dict[str, Any]], Any], reason: str
) -> None:
    content = json.loads(table.read_text())
    spoil(content)
    table.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=reason) as caught:
        tiles = [tuned.tile_for(PRODUCT) for _ in range(2)]
    assert tiles == [choose_tile(PRODUCT)] * 2 and len(caught) == 1


def test_a_table_that_is_no_json(table: Path) -> None:
    table.write_text("{")
    with pytest.warns(UserWarning, match="not JSON"):
        assert tuned.tile_for(PRODUCT) == choose_tile(PRODUCT)


def test_keys_of_compile_caches_change_with_a_table(tmp_path: Path, repo_root: Path) -> None:
    copied = tmp_path / "kernels"
    shutil.copytree(repo_root / "kernels", copied, ignore=shutil.ignore_patterns("__pycache__", "configs"))
    hashes = []
    for text in (None, "{}", "{ }"):
        if text is not None:
            (copied / "configs").mkdir(exist_ok=True)
            (copied / "configs" / "sm_90.json").write_text(text)
        hashes.append(hash_of_folders([copied]))
    assert len(set(hashes)) == 3


MODULES = ("tune", "gpu_kernels", "kernels_report", "roofline", "rows", "measure", "workloads")


@pytest.fixture(scope="module")
def tune(repo_root: Path) -> Iterator[ModuleType]:
    pytest.importorskip("transformers")
    sys.path.insert(0, str(repo_root / "benchmarks"))
    try:
        yield importlib.import_module("tune")
    finally:
        sys.path.remove(str(repo_root / "benchmarks"))
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.mark.parametrize("kernel", ["products", "gradients"])
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0)])
def test_candidates(tune: ModuleType, capability: tuple[int, int], kernel: Any) -> None:
    problem = Problem(4096, 256, 4096 if kernel == "products" else 0, 2, capability, products=2, kernel=kernel)
    tiles = tune.candidates(problem)
    assert tiles[0] == choose_tile(problem) and len(set(tiles)) == len(tiles) >= 10
    for tile in tiles:
        tuned.check_tile(tile, problem)
    # Of a problem of few rows and columns, none that computes mostly what is masked.
    assert all(tile.m <= 16 for tile in tune.candidates(dataclasses.replace(problem, rows=16))[1:])


def test_what_spills_or_exceeds_shared_memory_is_dropped(tune: ModuleType) -> None:
    """Compiled ahead of time: 64 x 128 sums leave one warp no register, seven tiles in flight no memory."""
    report: list[str] = []
    kernels_report = importlib.import_module("kernels_report")
    variant = kernels_report.variants()["down"]
    # What a pool of processes is given.
    assert pickle.loads(pickle.dumps(partial(kernels_report.build, variant, "sm_80"))).args == (variant, "sm_80")
    variant = dataclasses.replace(variant, problem=dataclasses.replace(variant.problem, capability=(8, 0)))
    good, spills, large = Tile(64, 64, 32, 4, 2), Tile(64, 128, 16, 1, 2), Tile(128, 128, 64, 8, 7)
    assert tune.compilable(variant, [good, spills, large], "sm_80", report.append) == [good]
    assert len(report) == 2
    assert "bytes spilled" in report[0] and not report[0].startswith("  dropped 64 x 128 x 16, 1 warps, 2 stages: 0 ")
    assert " 0 bytes spilled" in report[1]


def test_the_fastest_by_its_median_wins_where_it_saves_enough(tune: ModuleType) -> None:
    untuned, other, third = Tile(64, 64, 32, 4, 2), Tile(64, 128, 32, 4, 2), Tile(128, 64, 32, 4, 2)
    assert tune.fastest({untuned: 1.0, other: 0.97, third: 0.9}, untuned) == third
    assert tune.fastest({untuned: 1.0, other: 0.99}, untuned) == untuned
    assert tune.fastest({other: 0.99, third: 1.0}, untuned) == other


def test_tuning_from_candidates_to_a_table_that_launches_read(
    tune: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, table: Path
) -> None:
    """Stand-ins launch nothing, but ask for their tile as a launch does; a clock that knows the answer times them."""
    problem = Problem(3064, 143, 4096, 2, H100, products=2)
    seconds = {Tile(64, 64, 32, 4, 2): 5e-5, Tile(128, 64, 32, 4, 2): 6e-5}
    asked: list[Tile] = []

    def case(name: str, wrong: Tile | None = None) -> Any:
        def run(provider: str) -> list[torch.Tensor]:
            asked.append(tuned.tile_for(problem))
            return [torch.full((3,), 2.0 if asked[-1] == wrong else 1.0)]

        return importlib.import_module("gpu_kernels").KernelCase(name, run, lambda: [torch.ones(3)], 0.0, 1.0)

    def clock(run: Callable[[], object]) -> list[float]:
        run()
        middle = seconds.get(asked[-1], 1e-4)
        return [9e-1, middle, 1e-9]  # a mean, or the least, would choose another

    monkeypatch.setattr(tune, "compilable", lambda variant, tiles, arch, report, over: tiles)
    monkeypatch.setattr(tune, "candidates", lambda of: [choose_tile(of), *seconds, TILE])
    report: list[str] = []
    members = [tune.Member("a", case("a", wrong=TILE), None), tune.Member("b", case("b"), None)]
    entry = tune.tune(tuned.bucket(problem), members, "sm_90", clock, report.append)
    assert entry.tile == Tile(64, 64, 32, 4, 2)
    assert (entry.seconds, entry.untuned_seconds) == pytest.approx((1e-4, 2e-4))
    assert any("a is wrong with it" in line for line in report)

    tuned.write_table(tuned.TunedTable(H100, ORIGIN, (entry,), tuned.sources_hash()), table)
    assert tuned.read_table(table, H100).entries == (entry,)
    members[0].case.run("triton")
    assert asked[-1] == entry.tile
    monkeypatch.setattr(tune, "candidates", lambda of: [TILE])
    with pytest.raises(RuntimeError, match="chosen without a table"):
        tune.tune(problem, members[:1], "sm_90", clock, report.append)


def test_every_kernel_that_is_tuned_is_one_that_is_compiled_ahead_of_time(tune: ModuleType) -> None:
    gpu_kernels, roofline = (importlib.import_module(name) for name in ("gpu_kernels", "roofline"))
    sizes = {"batch": 1, "length": 40, "labels": 8, "hidden": 64, "ffn": 224, "heads": 4, "kv_heads": 2, "head_dim": 16}
    case = dataclasses.replace(roofline.CASES["math10k-8b"], **sizes)
    compiled = gpu_kernels.compiled_variants(case)
    assert [each.name for each in gpu_kernels.kernel_cases(case, "cpu")] == list(compiled)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_without_a_gpu_no_table_is_written(
    tune: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert tune.main(["--out", str(tmp_path / "table.json")]) == 1
    assert "no CUDA device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
