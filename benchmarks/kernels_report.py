"""Compile the generated Triton kernels ahead of time, without a GPU, and show what the compiler made of them.

    python benchmarks/kernels_report.py                         # those of the 8B workloads, for sm_80, sm_90, gfx942
    python benchmarks/kernels_report.py --arch sm_90 --source   # and their source

One line a kernel: registers of a thread, shared memory of a program, bytes that a thread spills, matrix instructions.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sparse_compile.kernels.channel_selection.triton import launch_sizes, norm_sizes
from sparse_compile.kernels.channel_selection.triton_scores import score_sizes
from sparse_compile.kernels.codegen.formula import parsed
from sparse_compile.kernels.codegen.packed_tiles import FourBit
from sparse_compile.kernels.codegen.score_source import ScoreSpec, score_source
from sparse_compile.kernels.codegen.triton_source import GradientSpec, ProductSpec, gradient_source, product_source
from sparse_compile.kernels.fused_linear.tiles import GFX942, Problem, Tile, choose_tile, shared_limit
from sparse_compile.kernels.fused_linear.triton import gradient_spec, product_spec
from sparse_compile.kernels.fused_linear.tuned import tile_for
from sparse_compile.kernels.token_rows.triton import launch_sizes as row_sizes
from sparse_compile.torch_private.inductor import load_source

CAPABILITIES = {"sm_80": (8, 0), "sm_90": (9, 0), "gfx942": GFX942}
"""The architectures that kernels are compiled for.

The kernels are not chosen on gfx942 (AMD's MI300): that they compile shows that nothing in them is NVIDIA's alone.
"""


@dataclass(frozen=True)
class Variant:
    """A kernel of one of the 8B workloads, in bf16.

    Attributes:
        spec: what is generated.
        problem: its sizes; the capability is that of the architecture it is compiled for.
        by_column: terms whose weight has its columns side by side in memory along the result's columns, as the
            transposed weights of the gradients' products do.
    """

    spec: ProductSpec | GradientSpec
    problem: Problem
    by_column: tuple[str, ...] = ()

    @property
    def packed(self) -> bool:
        """Whether it reads a weight that is stored in 4 bits."""
        return isinstance(self.spec, ProductSpec) and any(term.packed for term in self.spec.terms)

    def tile(self, arch: str) -> Tile:
        """Return the tile that is chosen for it on an architecture."""
        return choose_tile(self.on(arch)) if self.packed else tile_for(self.on(arch))

    def on(self, arch: str) -> Problem:
        """Return its sizes, on an architecture."""
        return dataclasses.replace(self.problem, capability=CAPABILITIES[arch])


@dataclass(frozen=True)
class Built:
    """A compiled kernel.

    Attributes:
        registers: a thread.
        shared: bytes of shared memory a program.
        spills: bytes of stack, or on AMD registers, that a thread spills.
        matrix_instructions: `mma.sync`, `wgmma` or `mfma` instructions in its assembly.
    """

    registers: int
    shared: int
    spills: int
    matrix_instructions: int


_SCALES = re.compile(r"(table|absmax|bytes|code|offset)_p\d+")
HIDDEN, FFN_CHANNELS, RANK, PREDICTOR_RANK, SCORED_TOKENS = 4096, 14336, 32, 8, 64
NF4 = FourBit(blocksize=64, whole_rows=True, nested=True)
SWIGLU = "p0*p1*sigmoid(p0)"
SWIGLU_LORA = "(p0 + 2.0*t0)*sigmoid(p0 + 2.0*t0)*(p1 + 2.0*t1)"


def variants(tokens: int = 3072, hidden: int = 4096, kept: int = 144, kept_heads: int = 1024) -> dict[str, Variant]:
    """Return the kernels of one sparse Llama block.

    Args:
        tokens: context tokens of the batch.
        hidden: width of the residual stream.
        kept: intermediate channels that are computed.
        kept_heads: channels of the query, or of the output projection's input, that are computed.
    """

    def problem(columns: int, depth: int, products: int = 1, *, scattered: bool = False) -> Problem:
        return Problem(tokens, columns, depth, 2, (9, 0), scattered=scattered, products=products)

    def elementwise(rank: int) -> Problem:
        return Problem(tokens, kept, rank, 2, (9, 0), products=2, kernel="gradients")

    def derivatives(formula: str, thins: int) -> GradientSpec:
        operands = parsed(formula).operands
        texts = tuple(each.text for each in parsed(formula).gradients(operands).formulas)
        return gradient_spec(2, thins, 0, texts)

    return {
        "gate, up": Variant(product_spec((0, 0), (0, 0), 0, 0, SWIGLU), problem(kept, hidden, 2)),
        "gate, up with adapters": Variant(product_spec((0, 0), (0, 0), 2, 0, SWIGLU_LORA), problem(kept, hidden, 4)),
        "activation backward": Variant(derivatives(SWIGLU, 0), elementwise(0)),
        "activation backward with adapters": Variant(derivatives(SWIGLU_LORA, 2), elementwise(RANK)),
        "gate, up backward": Variant(
            product_spec((0, 1), (1, 1), 0, 0, "p0 + p1"), problem(hidden, kept, 2), ("p0", "p1")
        ),
        "down": Variant(product_spec((0,), ("none",), 0, 0, "p0"), problem(hidden, kept, scattered=True)),
        "down with an adapter": Variant(
            product_spec((0,), ("none",), 1, 0, "p0 + 2.0*t0"), problem(hidden, kept, 2, scattered=True)
        ),
        "down backward": Variant(product_spec((0,), ("none",), 0, 0, "p0"), problem(kept, hidden, scattered=True)),
        "gate, up in 4 bits": Variant(product_spec((0, 0), (0, 0), 0, 0, SWIGLU, [NF4] * 2), problem(kept, hidden, 2)),
        "gate, up in 4 bits with adapters": Variant(
            product_spec((0, 0), (0, 0), 2, 0, SWIGLU_LORA, [NF4] * 2), problem(kept, hidden, 4)
        ),
        "gate, up in 4 bits backward": Variant(
            product_spec((0, 1), (1, 1), 0, 0, "p0 + p1", [NF4] * 2), problem(hidden, kept, 2)
        ),
        "query": Variant(product_spec((0,), (0,), 0, 0, "p0"), problem(kept_heads, hidden)),
        "query backward": Variant(product_spec((0,), (1,), 0, 0, "p0"), problem(hidden, kept_heads), ("p0",)),
        "output projection": Variant(
            product_spec((0,), ("none",), 0, 0, "p0"), problem(hidden, kept_heads, scattered=True)
        ),
    }


def build(variant: Variant, arch: str, tile: Tile | None = None) -> Built:
    """Compile one kernel for bf16 tensors.

    Args:
        variant: the kernel.
        arch: a key of `CAPABILITIES`.
        tile: how it is cut up; by default as it is chosen.
    """
    problem, tile = variant.problem, tile or variant.tile(arch)
    if isinstance(variant.spec, ProductSpec):
        kernel = load_source(product_source(variant.spec)).products
    else:
        kernel = load_source(gradient_source(variant.spec)).gradients
    names = kernel.arg_names
    constants: dict[str, Any] = {
        "PRECISION": "ieee", "INTERPRETED": False, "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k,
        "GROUP": tile.group, "d_y_column": 1,
    }  # fmt: skip
    # Triton compiles a stride of 1 in, as it does at a call.
    constants |= {name: 1 for name in names if re.fullmatch(r"x_\d+_col", name)}
    weights = [name for name in names if re.fullmatch(r"w_[pt]\d+", name)]
    constants |= {f"{name}_{'row' if name[2:] in variant.by_column else 'col'}": 1 for name in weights}
    pointers = {
        name: "*bf16" for name in names if re.fullmatch(r"x_\d+|w_[pt]\d+|vector_\d+|(saved|gradient)_\w+|d?_?y", name)
    }
    pointers |= {name: "*i64" for name in names if name.startswith("channels_")}
    if isinstance(variant.spec, ProductSpec):
        pointers |= {f"w_{term.name}": "*u8" for term in variant.spec.terms if term.packed}
    pointers |= {name: "*u8" if name[0] == "b" else "*fp32" for name in names if _SCALES.fullmatch(name)}
    # Rows of gathered tensors are as long as there are channels, but begin at multiples of 16 elements.
    divisible = {name for name in names if name.endswith(("_row", "_col"))}
    divisible |= {name for name in ("rows", "columns") if getattr(problem, name) % 16 == 0}
    divisible |= {name for name in names if re.fullmatch(r"depth_\d+", name) and problem.depth % 16 == 0}
    return _compile(kernel, pointers, constants, divisible, {"num_warps": tile.warps, "num_stages": tile.stages}, arch)


def build_selection(channels: int, arch: str) -> Built:
    """Compile the kernel that chooses among `channels` scores."""
    from sparse_compile.kernels.channel_selection.triton_kernels import largest_channels

    chunk, warps = launch_sizes(channels)
    pointers = {"scores": "*fp32", "channels": "*i64", "informative": "*i32"}
    divisible = {"n"} if channels % 16 == 0 else set()
    return _compile(largest_channels, pointers, {"CHUNK": chunk}, divisible, {"num_warps": warps}, arch)


def build_norms(rank: int, arch: str, *, has_bias: bool) -> tuple[Built, Built]:
    """Compile the two kernels of predicted norms, for activations of bf16 and factors of fp32 of a rank."""
    from sparse_compile.kernels.channel_selection.triton_kernels import gram_partials, norms_of_gram

    sizes = norm_sizes(rank, has_bias=has_bias)
    constants: dict[str, Any] = {
        "RANK": rank, "HAS_BIAS": has_bias, "CHUNK": sizes.chunk, "BLOCK_M": sizes.m, "BLOCK_N": sizes.n,
        "BLOCK_K": sizes.k, "BLOCK_R": sizes.r, "x_col": 1, "a_col": 1, "b_col": 1,
    }  # fmt: skip
    if not has_bias:
        constants["bias"] = None
    options = {"num_warps": sizes.warps}
    factors = {"x": "*bf16", "weights": "*i1", "a": "*fp32", "grams": "*fp32"}
    sums = _compile(gram_partials, factors, constants, {"rows", "depth", "x_row"}, options, arch)
    results = {"grams": "*fp32", "b": "*fp32", "norms": "*fp32", **({"bias": "*bf16"} if has_bias else {})}
    return sums, _compile(norms_of_gram, results, constants, {"columns", "b_row"}, options, arch)


def build_scores(spec: ScoreSpec, arch: str) -> tuple[Built, Built]:
    """Compile the two kernels of a block's scores, for activations and vectors of bf16 and factors of fp32."""
    kernels = load_source(score_source(spec))
    sizes = score_sizes(SCORED_TOKENS, HIDDEN, spec.ranks)
    built = []
    for kernel in (kernels.thin_products, kernels.scores):
        names = kernel.arg_names
        pointers = {name: "*fp32" for name in names if re.fullmatch(r"(a|b|thin)_p\d+|y", name)}
        pointers |= {name: "*bf16" for name in names if re.fullmatch(r"x|vector_\d+", name)}
        pointers |= {name: "*i1" for name in names if name == "valid"}
        constants = {"BLOCK_M": sizes.m, "BLOCK_N": sizes.n, "BLOCK_K": sizes.k}
        constants |= {name: 1 for name in names if name.endswith("_col")}
        divisible = {name for name in names if name in ("rows", "depth", "share", "columns", "x_row")}
        divisible |= {name for name in names if re.fullmatch(r"b_p\d+_row", name)}
        built.append(_compile(kernel, pointers, constants, divisible, {"num_warps": sizes.warps}, arch))
    return built[0], built[1]


def build_rows(name: str, width: int, arch: str) -> Built:
    """Compile the kernel that splits (`"take"`) or merges (`"put"`) rows of bf16, with channels picked or placed."""
    from sparse_compile.kernels.token_rows import triton_kernels

    _, block = row_sizes(1, width)
    pointers = dict.fromkeys(("x", "output", "context", "merged"), "*bf16")
    pointers |= {"output_rows": "*i64", "context_rows": "*i64", "columns": "*i64", "places": "*i32"}
    kernel = getattr(triton_kernels, name)
    pointers = {each: kind for each, kind in pointers.items() if each in kernel.arg_names}
    constants = {"HAS_COLUMNS": True, "BLOCK": block, "x_col": 1, "output_col": 1, "context_col": 1}
    divisible = {each for each in kernel.arg_names if each.endswith("_row") or each in ("width", "kept")}
    return _compile(kernel, pointers, constants, divisible, {}, arch)


def build_masked(problem: Problem, adapters: str, along_depth: bool, arch: str) -> Built:
    """Compile the masked product of bf16 tensors with an adapter of rank 32.

    Args:
        problem: its sizes.
        adapters: Triton's name of the adapters' dtype.
        along_depth: whether neighbours in memory are neighbours along the depth (forward), else along the columns.
        arch: a key of `CAPABILITIES`.
    """
    from sparse_compile.kernels.masked_linear.triton import masked_tile
    from sparse_compile.kernels.masked_linear.triton_kernels import masked_product

    tile = masked_tile(dataclasses.replace(problem, capability=CAPABILITIES[arch]))
    contiguous = ("w_depth", "left_rank", "right_depth") if along_depth else ("w_column", "left_column", "right_rank")
    constants: dict[str, Any] = {
        "x_depth": 1, **dict.fromkeys(contiguous, 1), "bias": None, "RANK": 32, "HAS_BIAS": False, "PRECISION": "ieee",
        "INTERPRETED": False, "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "BLOCK_R": 32,
        "GROUP": tile.group,
    }  # fmt: skip
    tensors = {"x": "*bf16", "w": "*bf16", "left": f"*{adapters}", "right": f"*{adapters}", "y": "*bf16"}
    divisible = {"rows", "columns", "depth", "x_row", "w_column", "w_depth"}
    divisible |= {"left_column", "left_rank", "right_rank", "right_depth"}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return _compile(masked_product, tensors, constants, divisible, options, arch, {"scale": "fp32"})


def _compile(
    kernel: Any,
    pointers: dict[str, str],
    constants: dict[str, Any],
    divisible: set[str],
    options: dict[str, int],
    arch: str,
    numbers: Mapping[str, str] = MappingProxyType({}),
) -> Built:
    """Compile a kernel whose other arguments are 32-bit integers.

    Args:
        kernel: a Triton function.
        pointers: types of the arguments that are tensors, which begin at multiples of 16 bytes.
        constants: values of what is compiled in; names that the kernel does not have are left out.
        divisible: numbers that are multiples of 16.
        options: of the compiler.
        arch: a key of `CAPABILITIES`.
        numbers: types of the arguments that are neither tensors nor such integers.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    types = {**dict.fromkeys(names, "i32"), **pointers, **numbers, **dict.fromkeys(constants, "constexpr")}
    signature = {name: types[name] for name in names}
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in (divisible | set(pointers)) - set(constants)},
    )
    if arch.startswith("gfx"):
        compiled = triton.compile(source, target=GPUTarget("hip", arch, 64), options=options)
        assembly = compiled.asm["amdgcn"]
        found = re.findall(r"\.(vgpr_count|[sv]gpr_spill_count): +(\d+)", assembly)
        counts = {name: int(value) for name, value in found}
        registers, spills = counts["vgpr_count"], counts["sgpr_spill_count"] + counts["vgpr_spill_count"]
    else:
        compiled = triton.compile(source, target=GPUTarget("cuda", int(arch[3:]), 32), options=options)
        assembly = compiled.asm["ptx"]
        usage = _resource_usage(compiled.asm["cubin"])
        registers, spills = usage["REG"], usage["STACK"]
    matrix_instructions = len(re.findall(r"wgmma\.mma_async|mma\.sync|v_mfma", assembly))
    return Built(registers, compiled.metadata.shared, spills, matrix_instructions)


def _resource_usage(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        done = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True)
    return {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", done.stdout + done.stderr)}


def main(argv: Sequence[str] | None = None) -> int:
    """Compile and print; return 1 where a kernel spills or exceeds shared memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=sorted(CAPABILITIES), action="append", help="default: all")
    parser.add_argument("--source", action="store_true", help="print the source of each kernel as well")
    args = parser.parse_args(argv)
    failed = False

    def show(name: str, tile: str, arch: str, built: Built) -> None:
        nonlocal failed
        failed |= bool(built.spills) or built.shared > shared_limit(CAPABILITIES[arch])
        figures = (built.registers, f"{built.shared / 1024:.0f}", built.spills, built.matrix_instructions)
        print("|", " | ".join(map(str, (name, arch, tile, *figures))), "|")

    print("| kernel | arch | tile | registers | shared, KiB | spills | matrix instructions |")
    print("|---" * 7 + "|")
    archs = args.arch or list(CAPABILITIES)
    for name, variant in variants().items():
        for arch in archs:
            tile = variant.tile(arch)
            show(name, f"{tile.m} x {tile.n} x {tile.k}, {tile.warps} warps", arch, build(variant, arch))
        if args.source:
            of_product = isinstance(variant.spec, ProductSpec)
            print(product_source(variant.spec) if of_product else gradient_source(variant.spec))  # type: ignore[arg-type]
    chunk, warps = launch_sizes(FFN_CHANNELS)
    for arch in archs:
        show("choice of channels", f"{chunk} scores, {warps} warps", arch, build_selection(FFN_CHANNELS, arch))
    sizes = norm_sizes(PREDICTOR_RANK, has_bias=False)
    parts = (("predictor: sums over tokens", f"{sizes.m} tokens"), ("predictor: norms", f"{sizes.n} channels"))
    for index, (name, tile) in enumerate(parts):
        for arch in archs:
            show(name, tile, arch, build_norms(PREDICTOR_RANK, arch, has_bias=False)[index])
    spec = ScoreSpec((PREDICTOR_RANK, PREDICTOR_RANK), 0, SWIGLU)
    scored = score_sizes(SCORED_TOKENS, HIDDEN, spec.ranks)
    parts = (
        ("predictor: gate, up of some tokens", f"{scored.m} tokens x {scored.share} channels"),
        ("predictor: scores", f"{scored.n} channels"),
    )
    for index, (name, tile) in enumerate(parts):
        for arch in archs:
            show(name, tile, arch, build_scores(spec, arch)[index])
    square = Problem(4096, HIDDEN, HIDDEN, 2, (9, 0))
    for name, along_depth in (("masked product", True), ("masked product, gradient of x", False)):
        for arch in archs[:2]:
            show(name, "as the products", arch, build_masked(square, "bf16", along_depth, arch))
    for name, kernel in (("split of tokens", "take"), ("merge of tokens", "put")):
        for arch in archs:
            show(name, f"{row_sizes(1, HIDDEN)[1]} channels", arch, build_rows(kernel, HIDDEN, arch))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
