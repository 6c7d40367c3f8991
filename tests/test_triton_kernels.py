"""The Triton kernels without a GPU: run by the interpreter, and compiled ahead of time for sm_80 and sm_90."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparse_compile.kernels.gathered_linear import GATHERED_LINEAR
from sparse_compile.kernels.gathered_linear.tiles import Problem, Tile, choose_tile
from sparse_compile.kernels.providers import REFERENCE, OpCall, triton_runs

pytest.importorskip("triton", reason="needs triton, for its interpreter and its compiler")

SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10}


def test_kernels_under_the_interpreter(repo_root: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repo_root / "tests")}
    done = subprocess.run(
        [sys.executable, str(repo_root / "tests" / "triton_cases.py")],
        env=environment, cwd=repo_root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert [line for line in lines if not line.startswith("ok ")] == []
    assert len(lines) == 58


# The 8B shapes: hidden 4096, feed-forward 14336 of which 143 channels are kept, 3072 context tokens.
PRODUCTS = {
    "gate": (Problem(3072, 143, 4096, 2, (9, 0)), "rows", True),
    "gate backward": (Problem(3072, 4096, 143, 2, (9, 0)), "depth", False),
    "down, packed": (Problem(3072, 4096, 143, 2, (9, 0), scattered=True), "none", True),
}


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", PRODUCTS)
def test_matrix_kernels_compile_ahead_of_time(name: str, arch: int) -> None:
    from aot import compile_product

    problem, gather, along_depth = PRODUCTS[name]
    built = compile_product(problem, gather, along_depth, arch)
    assert built.spills == 0
    assert 0 < built.shared <= SHARED_LIMIT[arch]
    assert built.matrix_instructions > 0 and built.registers <= 255


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("adapters", ["fp32", "bf16"])
@pytest.mark.parametrize("along_depth", [True, False], ids=["forward", "input gradient"])
def test_masked_kernels_compile_ahead_of_time(along_depth: bool, adapters: str, arch: int) -> None:
    from aot import compile_masked

    built = compile_masked(Problem(4096, 4096, 4096, 2, (9, 0)), adapters, along_depth, arch)
    assert built.spills == 0
    assert 0 < built.shared <= SHARED_LIMIT[arch]
    assert built.matrix_instructions > 0 and built.registers <= 255


def test_tiles() -> None:
    large = choose_tile(Problem(3072, 4096, 4096, 2, (9, 0)))
    assert large == Tile(128, 128, 64, 8, 4)
    assert choose_tile(Problem(3072, 4096, 4096, 2, (8, 0))).stages == 3
    assert (choose_tile(Problem(1, 143, 4096, 2, (9, 0))).m, choose_tile(Problem(1, 1, 1, 2, (9, 0))).k) == (16, 16)
    # Fewer tokens than a tile has rows: the scattered slice is read once either way.
    assert [choose_tile(Problem(n, 64, 64, 2, (9, 0), scattered=True)).pack for n in (128, 129)] == [False, True]
    assert not choose_tile(Problem(4096, 64, 64, 2, (9, 0))).pack


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_tile_is_legal(capability: tuple[int, int], itemsize: int) -> None:
    sizes = (1, 15, 16, 17, 143, 430, 4096)
    for rows in sizes:
        for columns in sizes:
            for depth in sizes:
                tile = choose_tile(Problem(rows, columns, depth, itemsize, capability))
                assert all(size >= 16 and size & (size - 1) == 0 for size in (tile.m, tile.n, tile.k))
                assert tile.shared_bytes * itemsize // 2 <= SHARED_LIMIT[10 * capability[0]]


def test_what_the_triton_provider_declines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert triton_runs(OpCall("cpu", torch.float32)) == "runs on NVIDIA GPUs, not on cpu"
    assert triton_runs(OpCall("cuda", torch.float64)) == "computes fp32, fp16 and bf16, not torch.float64"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert triton_runs(OpCall("cuda", torch.float16)) == "needs compute capability 8.0, this device has 7.5"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert triton_runs(OpCall("cuda", torch.bfloat16)) is None


def test_it_is_not_chosen_before_a_gpu_has_measured_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    choice = GATHERED_LINEAR.choose(OpCall("cuda", torch.bfloat16))
    assert choice.provider == REFERENCE
    assert dict(choice.declined)["triton"].startswith("nothing shows yet that it is faster")
