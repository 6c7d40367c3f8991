"""The Triton kernels without a GPU: run by the interpreter, and compiled ahead of time for sm_80, sm_90 and gfx942."""

from __future__ import annotations

import importlib
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from sparse_compile.kernels.channel_selection import PREDICTED_NORMS, PREDICTED_SCORES
from sparse_compile.kernels.codegen.score_source import ScoreSpec
from sparse_compile.kernels.codegen.triton_source import ProductSpec
from sparse_compile.kernels.fused_linear.tiles import (
    GFX942,
    Problem,
    Tile,
    architecture,
    choose_elementwise_tile,
    choose_tile,
    shared_limit,
)
from sparse_compile.kernels.gathered_linear import GATHERED_LINEAR
from sparse_compile.kernels.providers import REFERENCE, OpCall, triton_runs
from sweeps import slow, sweep

pytest.importorskip("triton", reason="needs triton, for its interpreter and its compiler")


@pytest.mark.parametrize(
    ("options", "cases"), [pytest.param(("--one-of-each-kind",), 19, id="one of each kind"), slow((), 218, id="all")]
)
def test_kernels_under_the_interpreter(repo_root: Path, options: tuple[str, ...], cases: int) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(repo_root / "tests" / "helpers" / "triton_cases.py"), *options],
        env=environment, cwd=repo_root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert [line for line in lines if not line.startswith("ok ")] == []
    assert len(lines) == cases


@pytest.fixture(scope="module")
def report(repo_root: Path) -> Iterator[ModuleType]:
    """Import the program as it imports its own modules: from its folder."""
    sys.path.insert(0, str(repo_root / "benchmarks"))
    try:
        yield importlib.import_module("kernels_report")
    finally:
        sys.path.remove(str(repo_root / "benchmarks"))
        sys.modules.pop("kernels_report", None)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_every_kernel_of_a_block_compiles_ahead_of_time(report: ModuleType, arch: str) -> None:
    """The 8B shapes: hidden 4096, feed-forward 14336 of which 143 or 430 channels are kept, 3072 context tokens."""
    variants = report.variants() | {
        f"{name}, o1": each
        for name, each in report.variants(4073, 4096, 430, 3276).items()
        if "4 bits" not in name  # what they add to the kernels of dense weights does not depend on these sizes
    }
    for name, variant in variants.items():
        built = report.build(variant, arch)
        assert built.spills == 0, name
        assert built.shared <= shared_limit(report.CAPABILITIES[arch]), name
        assert built.registers <= (512 if arch == "gfx942" else 255), name
        if isinstance(variant.spec, ProductSpec) or variant.spec.thin:
            assert built.matrix_instructions > 0, name
    for rows in ("take", "put"):
        assert report.build_rows(rows, 4096, arch).spills == 0
    for channels in (14336, 1000):
        assert report.build_selection(channels, arch).spills == 0
    for ranks, formula, vectors in (((8, 8), report.SWIGLU, 0), ((63, 63), "select(p0 + v0, p0 + v0, 0)*p1", 1)):
        for built in report.build_scores(ScoreSpec(ranks, vectors, formula), arch):
            assert built.spills == 0 and built.shared <= shared_limit(report.CAPABILITIES[arch]), ranks
    for rank, has_bias in ((8, False), (63, True)):
        for built in report.build_norms(rank, arch, has_bias=has_bias):
            assert built.spills == 0 and built.shared <= shared_limit(report.CAPABILITIES[arch]), rank


@pytest.mark.slow
def test_the_report(report: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    variants = {"down": report.variants()["down"], "activation backward": report.variants()["activation backward"]}
    monkeypatch.setattr(report, "variants", lambda: variants)
    assert report.main(["--arch", "sm_90", "--source"]) == 0
    printed = capsys.readouterr().out
    assert "| down | sm_90 | 128 x 128 x 64, 8 warps |" in printed
    assert "def products(" in printed and "def gradients(" in printed
    monkeypatch.setattr(report, "build", lambda variant, arch: report.Built(255, 1024, 8, 0))
    assert report.main(["--arch", "sm_90"]) == 1


@pytest.mark.parametrize("arch", sweep(["sm_80", "sm_90"], "sm_90"))
@pytest.mark.parametrize("adapters", sweep(["fp32", "bf16"], "bf16"))
@pytest.mark.parametrize("along_depth", [pytest.param(True, id="forward"), slow(False, id="input gradient")])
def test_masked_kernels_compile_ahead_of_time(report: ModuleType, along_depth: bool, adapters: str, arch: str) -> None:
    built = report.build_masked(Problem(4096, 4096, 4096, 2, (9, 0)), adapters, along_depth, arch)
    assert built.spills == 0
    assert 0 < built.shared <= shared_limit(report.CAPABILITIES[arch])
    assert built.matrix_instructions > 0 and built.registers <= 255


def test_tiles() -> None:
    large = choose_tile(Problem(3072, 4096, 4096, 2, (9, 0)))
    assert large == Tile(128, 128, 64, 8, 4)
    assert choose_tile(Problem(3072, 4096, 4096, 2, (8, 0))).stages == 3
    assert (choose_tile(Problem(1, 143, 4096, 2, (9, 0))).m, choose_tile(Problem(1, 1, 1, 2, (9, 0))).k) == (16, 16)
    # Fewer tokens than a tile has rows: the scattered slice is read once either way.
    assert [choose_tile(Problem(n, 64, 64, 2, (9, 0), scattered=True)).pack for n in (128, 129)] == [False, True]
    assert not choose_tile(Problem(4096, 64, 64, 2, (9, 0))).pack


CAPABILITIES = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), GFX942]


@pytest.mark.parametrize("capability", CAPABILITIES, ids=architecture)
def test_every_tile_is_legal(capability: tuple[int, int]) -> None:
    for products, itemsize in itertools.product((1, 2, 4), (2, 4)):
        for rows, columns, depth in itertools.product((1, 15, 16, 17, 143, 430, 4096), repeat=3):
            tile = choose_tile(Problem(rows, columns, depth, itemsize, capability, products=products))
            assert all(size >= 16 and size & (size - 1) == 0 for size in (tile.m, tile.n, tile.k))
            assert tile.shared_bytes * itemsize // 2 <= shared_limit(capability)
            assert 2 <= tile.stages <= 4


def test_architectures_have_tiles_of_their_own() -> None:
    """What is in flight differs: it is bounded by shared memory, and gains by how an architecture copies into it."""
    stages = {architecture(each): choose_tile(Problem(3072, 4096, 4096, 2, each)).stages for each in CAPABILITIES}
    assert stages == {"sm_80": 3, "sm_86": 3, "sm_89": 3, "sm_90": 4, "sm_100": 4, "sm_120": 3, "gfx942": 2}
    assert shared_limit((9, 0)) == 227 << 10 and shared_limit((8, 6)) == 99 << 10 and shared_limit(GFX942) == 64 << 10


def test_tiles_of_several_products() -> None:
    assert choose_tile(Problem(3072, 143, 4096, 2, (9, 0), products=2)) == Tile(128, 64, 64, 8, 4)
    assert choose_tile(Problem(3072, 143, 4096, 2, (9, 0), products=4)) == Tile(64, 64, 64, 8, 4)
    assert choose_elementwise_tile(3072, 143) == Tile(32, 64, 32, 4, 2)
    assert choose_elementwise_tile(3, 5) == Tile(16, 16, 32, 4, 2)


def test_what_the_triton_provider_declines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert triton_runs(OpCall("cpu", torch.float32)) == "runs on NVIDIA GPUs, not on cpu"
    assert triton_runs(OpCall("cuda", torch.float64)) == "computes fp32, fp16 and bf16, not torch.float64"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert triton_runs(OpCall("cuda", torch.float16)) == "needs compute capability 8.0, this device has 7.5"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert triton_runs(OpCall("cuda", torch.bfloat16)) is None


def test_factors_of_a_large_rank_are_left_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for table in (PREDICTED_NORMS, PREDICTED_SCORES):
        assert table.choose(OpCall("cuda", torch.bfloat16, rank=63), "triton").provider == "triton"
        choice = table.choose(OpCall("cuda", torch.bfloat16, rank=64), "triton")
        assert choice.provider == REFERENCE
        assert choice.declined == (("triton", "keeps factors of rank 63 at most in registers, these have 64"),)


def test_it_is_not_chosen_before_a_gpu_has_measured_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    choice = GATHERED_LINEAR.choose(OpCall("cuda", torch.bfloat16))
    assert choice.provider == REFERENCE
    assert dict(choice.declined)["triton"].startswith("nothing shows yet that it is faster")
    assert GATHERED_LINEAR.choose(OpCall("cuda", torch.bfloat16), "triton").provider == "triton"
