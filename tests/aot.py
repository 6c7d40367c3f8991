"""Compile Triton kernels for an NVIDIA architecture without a GPU, and read what the compiler made of them."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_compile.kernels.gathered_linear.tiles import Gather, Problem, choose_tile


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
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sparse_compile.kernels.gathered_linear.triton_kernels import gathered_product

    tile = choose_tile(dataclasses.replace(problem, capability=(arch // 10, 0)))
    constants: dict[str, Any] = {
        "x_depth": 1, "w_depth" if along_depth else "w_row": 1, "GATHER": gather, "PRECISION": "ieee",
        "INTERPRETED": False, "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP": tile.group,
    }  # fmt: skip
    pointers = {"x": "*bf16", "w": "*bf16", "channels": "*i64", "y": "*bf16"}
    names = gathered_product.arg_names
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    divisible = {"x", "w", "channels", "y", "x_row", "w_row", "w_depth"} - set(constants)
    divisible |= {name for name in ("rows", "columns", "depth") if getattr(problem, name) % 16 == 0}
    source = ASTSource(
        gathered_product,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
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
