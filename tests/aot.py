"""Compile Triton kernels for an NVIDIA architecture without a GPU, and read what the compiler made of them."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_compile.kernels.gathered_linear.tiles import Gather, Problem, Tile, choose_tile


@dataclass(frozen=True)
class Built:
    """A compiled kernel.

    Attributes:
        registers: a thread.
        shared: bytes of shared memory a program.
        spills: bytes of stack that a thread spills to.
        matrix_instructions: `mma.sync` or `wgmma` instructions in its PTX.
    """

    registers: int
    shared: int
    spills: int
    matrix_instructions: int


def compile_product(problem: Problem, gather: Gather, along_depth: bool, arch: int) -> Built:
    """Compile the gathered product of bf16 tensors.

    Args:
        problem: its sizes; the capability is that of `arch`.
        gather: which dimension of the weight is indexed.
        along_depth: whether neighbours in memory are neighbours along the depth, else along the columns.
        arch: 80 or 90.
    """
    from sparse_compile.kernels.gathered_linear.triton_kernels import gathered_product

    tile = choose_tile(dataclasses.replace(problem, capability=(arch // 10, 0)))
    constants: dict[str, Any] = {
        "x_depth": 1, "w_depth" if along_depth else "w_row": 1, "GATHER": gather, "PRECISION": "ieee",
        "INTERPRETED": False, "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP": tile.group,
    }  # fmt: skip
    pointers = {"x": "*bf16", "w": "*bf16", "channels": "*i64", "y": "*bf16"}
    divisible = {"x", "w", "channels", "y", "x_row", "w_row", "w_depth"}
    divisible |= {name for name in ("rows", "columns", "depth") if getattr(problem, name) % 16 == 0}
    return _compiled(gathered_product, constants, pointers, divisible, tile, arch)


def compile_masked(problem: Problem, adapters: str, along_depth: bool, arch: int) -> Built:
    """Compile the masked product of bf16 tensors with an adapter of rank 32.

    Args:
        problem: its sizes; the capability is that of `arch`.
        adapters: Triton's name of the adapters' dtype.
        along_depth: whether neighbours in memory are neighbours along the depth (forward), else along the columns.
        arch: 80 or 90.
    """
    from sparse_compile.kernels.masked_linear.triton import masked_tile
    from sparse_compile.kernels.masked_linear.triton_kernels import masked_product

    tile = masked_tile(dataclasses.replace(problem, capability=(arch // 10, 0)))
    contiguous = ("w_depth", "left_rank", "right_depth") if along_depth else ("w_column", "left_column", "right_rank")
    constants: dict[str, Any] = {
        "x_depth": 1, **dict.fromkeys(contiguous, 1), "bias": None, "RANK": 32, "HAS_BIAS": False, "PRECISION": "ieee",
        "INTERPRETED": False, "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "BLOCK_R": 32,
        "GROUP": tile.group,
    }  # fmt: skip
    pointers = {
        "x": "*bf16",
        "w": "*bf16",
        "left": f"*{adapters}",
        "right": f"*{adapters}",
        "y": "*bf16",
        "scale": "fp32",
    }
    divisible = {"x", "w", "left", "right", "y", "rows", "columns", "depth", "x_row", "w_column", "w_depth"}
    divisible |= {"left_column", "left_rank", "right_rank", "right_depth"}
    return _compiled(masked_product, constants, pointers, divisible, tile, arch)


def _compiled(
    kernel: Any, constants: dict[str, Any], types: dict[str, str], divisible: set[str], tile: Tile, arch: int
) -> Built:
    """Compile a kernel whose arguments are int32 unless `types` or `constants` has them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in divisible - set(constants)},
    )
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage = _resource_usage(compiled.asm["cubin"])
    return Built(
        registers=usage["REG"],
        shared=compiled.metadata.shared,
        spills=usage["STACK"],
        matrix_instructions=len(re.findall(r"wgmma\.mma_async|mma\.sync", compiled.asm["ptx"])),
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        done = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True)
    return {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", done.stdout + done.stderr)}
