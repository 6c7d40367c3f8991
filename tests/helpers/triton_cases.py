"""Run the generated Triton kernels under the interpreter, chosen before Triton is imported: a program of its own.

Each case prints a line `ok NAME` or `FAILED NAME: reason`; `test_triton_kernels.py` starts this file and reads them.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor, nn

import triton_4bit_cases
import triton_token_cases
from graphs import Head, frozen, gradients_of, lora, run_rewritten, tokens
from models import batch, fp64_decoder
from sparse_compile.kernels.channel_selection import record_channels
from sparse_compile.kernels.codegen.triton_source import product_source
from sparse_compile.kernels.fused_linear import fused_linear, fused_linear_gradients, tuned
from sparse_compile.kernels.fused_linear import triton as fused_provider
from sparse_compile.kernels.fused_linear.reference import fused_linear_gradients as plain_gradients
from sparse_compile.kernels.fused_linear.tiles import Problem, Tile
from sparse_compile.kernels.fused_linear.triton import product_spec
from sparse_compile.kernels.gathered_linear import gathered_input_linear, gathered_linear, reference
from sparse_compile.kernels.masked_linear import masked_linear, masked_weight
from sparse_compile.kernels.masked_linear.reference import exact_gradients
from sparse_compile.options.config import SparseLoRAConfig
from tolerances import Tolerance, assert_close_rms
from triton_operands import DTYPES, chosen, drawn

SHAPES = (
    # tokens, in, out, kept
    (33, 65, 47, 13),
    (1, 16, 16, 16),
    (5, 7, 9, 1),
    (0, 7, 9, 3),
    (40, 1, 19, 17),
    (130, 20, 70, 33),
)
FORMULAS = {
    "swiglu": "p0*p1*sigmoid(p0)",
    "swiglu, adapters, bias": "(p0 + 2*t0 + v0)*sigmoid(p0 + 2*t0 + v0)*(p1 + 0.5*t1)",
    "geglu tanh": "p0*p1*sigmoid(1.5957691216057308*(p0 + 0.044715*p0**3))",
    "geglu erf": "p1*p0*(1 + erf(0.7071067811865476*p0))/2",
    "reglu": "select(p0, p0, 0)*p1",
    "relu squared": "select(p0 + v0, p0 + v0, 0)**2",
    "clamped": "select(-0.5 - p0, -0.5, select(p0 - 0.7, 0.7, p0))*v0",
    "softplus": "softplus(p0 + t0)",
    "mish": "p0*tanh(softplus(p0))",
    "elu": "select(p0, p0, exp(select(p0, 0, p0)) - 1)",
    "roots and powers": "p0*(1 + p0**2)**(-1/2) + sqrt(1 + p1**2) + log(1 + p1**2) + (2 + p0**2)**(-2)",
    "sum": "p0 + p1 + t0 + v0",
    "weighted sum": "0.5*p0 - p1 + 2*t0",
    "a scale": "v0*(p0 + 2*t0)",
    "constant": "3",
}


def gathered(dtype: torch.dtype, shape: tuple[int, ...], strided: bool) -> None:
    """Forward and backward of both gathered ops, through their autograd formulas, against fp64."""
    tokens, width, out, kept = shape
    weight = drawn(width, out, seed=1, dtype=dtype).t() if strided else drawn(out, width, seed=1, dtype=dtype)
    for op, plain, columns, total in (
        (gathered_linear, reference.gathered_linear, width, out),
        (gathered_input_linear, reference.gathered_input_linear, min(kept, width), width),
    ):
        channels = chosen(total, min(kept, total))
        x = drawn(columns, tokens, seed=2, dtype=dtype).t() if strided else drawn(tokens, columns, seed=2, dtype=dtype)
        wide = x.double().requires_grad_()
        x = x.requires_grad_()
        y, expected = op(x, weight, channels, "triton"), plain(wide, weight.double(), channels)
        assert y.dtype == dtype
        assert_close_rms(y, expected, name=f"{op._name} forward")
        d_y = drawn(*y.shape, seed=4, dtype=dtype)
        (d_x,) = torch.autograd.grad(y, x, d_y)
        (wanted,) = torch.autograd.grad(expected, wide, d_y.double())
        assert_close_rms(d_x, wanted, name=f"{op._name} backward")


def other_weight_dtype() -> None:
    """fp32 weights under bf16 activations, cast as they are loaded."""
    x, weight = drawn(9, 20, seed=0, dtype=torch.bfloat16), drawn(11, 20, seed=1, dtype=torch.float32)
    channels = chosen(11, 5)
    y = gathered_linear(x, weight, channels, "triton")
    assert y.dtype == torch.bfloat16
    assert_close_rms(y, reference.gathered_linear(x.double(), weight.bfloat16().double(), channels))


def fused(formula: str, dtype: torch.dtype, shape: tuple[int, ...], dim: int = 0) -> None:
    """Forward and every gradient of a fused product, through its autograd formula, against fp64."""
    tokens, width, out, kept = shape
    total = (out, width)[dim]
    channels = chosen(total, min(kept, total))
    columns = channels.numel() if dim == 0 else out
    depth = width if dim == 0 else channels.numel()
    # Products of unit variance: bounds are relative to the result, and exp of a large number has a large error.
    weights = [drawn(out, width, seed=s, dtype=torch.float32).div(depth**0.5).to(dtype) for s in (1, 2)]
    trained = [
        *(drawn(tokens, depth, seed=10 + s, dtype=dtype) for s in range(2 if dim else 1)),
        *(drawn(tokens, 5, seed=20 + s, dtype=dtype) for s in range(2)),
        *(drawn(columns, 5, seed=30 + s, dtype=torch.float32).div(5**0.5).to(dtype) for s in range(2)),
        drawn(columns, seed=40, dtype=dtype),
    ]

    def run(wide: bool) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        leaves = [(each.double() if wide else each).clone().requires_grad_() for each in trained]
        xs, (thin_0, thin_1, factor_0, factor_1, vector) = leaves[:-5], leaves[-5:]
        results = fused_linear(
            xs, [weight.to(leaves[0].dtype) for weight in weights], [channels, channels], [0, len(xs) - 1], [dim, dim],
            [thin_0, thin_1], [factor_0, factor_1], [vector], formula, leaves[0].dtype,
            [], "", "reference" if wide else "triton",
        )  # fmt: skip
        y = results[0]
        assert y.dtype == leaves[0].dtype and y.stride() == (-(-columns // 16) * 16, 1)
        d_y = drawn(*y.shape, seed=4, dtype=dtype).to(y.dtype)
        return y, torch.autograd.grad(y, leaves, d_y, allow_unused=True, materialize_grads=True)

    (y, found), (expected, wanted) = run(False), run(True)
    assert_close_rms(y, expected, name="forward")
    for index, (gradient, reference_) in enumerate(zip(found, wanted, strict=True)):
        assert_close_rms(gradient, reference_, dtype, name=f"gradient {index}")


def whole_weight(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """A layer and its adapter in one kernel, forward and gradients, against fp64."""
    tokens, width, out, rank = shape
    weight = drawn(out, width, seed=1, dtype=torch.float32).div(width**0.5).to(dtype)
    factor = drawn(out, rank, seed=12, dtype=torch.float32).div(rank**0.5).to(dtype)
    leaves = [drawn(tokens, width, seed=10, dtype=dtype), drawn(tokens, rank, seed=11, dtype=dtype), factor]
    bias = drawn(out, seed=13, dtype=dtype)

    def run(wide: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        of = torch.float64 if wide else dtype
        x, thin, factor = (each.to(of).requires_grad_() for each in leaves)
        (y,) = fused_linear(
            [x], [weight.to(of)], [], [0], [-1], [thin], [factor], [bias.to(of)], "p0 + 2*t0 + v0", of,
            [], "", "reference" if wide else "triton",
        )  # fmt: skip
        return y, torch.autograd.grad(y, (x, thin, factor), drawn(*y.shape, seed=4, dtype=dtype).to(of))

    (y, found), (expected, wanted) = run(False), run(True)
    assert_close_rms(y, expected, name="forward")
    for index, (gradient, reference_) in enumerate(zip(found, wanted, strict=True)):
        assert_close_rms(gradient, reference_, dtype, name=f"gradient {index}")


def gradients_of_strided() -> None:
    """A gradient that comes as a transposed view, saved products that come packed, and one of fp32 for bf16."""
    d_y, product = drawn(21, 40, seed=0, dtype=torch.float32).t(), drawn(40, 21, seed=1, dtype=torch.bfloat16)
    texts = "sigmoid(p0);(1 - sigmoid(p0))*p0"
    found = fused_linear_gradients(d_y, [product], [], [], [], texts, torch.bfloat16, "triton")
    expected = plain_gradients(d_y.double(), [product.double()], [], [], [], texts, torch.float64)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.bfloat16
        assert_close_rms(one, other)


def in_kernel_index_loads() -> None:
    """A scattered slice is indexed in the kernel as well where there are few rows: no copy is made for one tile."""
    x, weight = drawn(7, 40, seed=0, dtype=torch.float32), drawn(50, 90, seed=1, dtype=torch.float32)
    channels = chosen(90, 40)
    y = gathered_input_linear(x, weight, channels, "triton")
    assert_close_rms(y, reference.gathered_input_linear(x.double(), weight.double(), channels))


def one_tile_of_registers_for_a_sum() -> None:
    source = product_source(product_spec((0, 1), (1, 1), 1, 0, "p0 + p1 + t0"))
    assert source.count("tl.zeros(") == 1
    assert product_source(product_spec((0, 1), (1, 1), 0, 0, "p0 - p1")).count("tl.zeros(") == 2


def tile_of_a_table() -> None:
    """A launch takes the tile of its entry, as what is compiled in, and computes the same with it."""
    x, weight = drawn(40, 70, seed=0, dtype=torch.float32), drawn(33, 70, seed=1, dtype=torch.float32)
    channels = chosen(33, 20)
    problem, tile = Problem(64, 32, 128, 4, (9, 0)), Tile(16, 32, 64, 4, 1, group=3)
    launched: list[Tile] = []
    launch, tables = fused_provider._launch, tuned.tuned_tiles

    def spy(kernel: object, grid: tuple[int, ...], arguments: dict[str, object], used: Tile, of: Tensor) -> None:
        launched.append(used)
        assert (arguments["BLOCK_K"], arguments["GROUP"], grid) == (64, 3, (3,))
        launch(kernel, grid, arguments, used, of)

    fused_provider._launch, tuned.tuned_tiles = spy, lambda capability: {problem: tile}
    try:
        y = gathered_linear(x, weight, channels, "triton")
    finally:
        fused_provider._launch, tuned.tuned_tiles = launch, tables
    assert launched == [tile]
    assert_close_rms(y, reference.gathered_linear(x.double(), weight.double(), channels))


def kernels_of_the_benchmarks() -> None:
    """What `benchmarks/gpu.py` and `tune.py` run on a GPU, at a tiny size; it is what is compiled ahead of time."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
    from gpu_kernels import TOLERANCE, compiled_variants, kernel_cases
    from roofline import CASES
    from tune import launched_problem

    sizes = {"batch": 1, "length": 40, "labels": 8, "hidden": 64, "ffn": 224, "heads": 4, "kv_heads": 2, "head_dim": 16}
    case = dataclasses.replace(CASES["csr-8b"], **sizes)
    for each in kernel_cases(case, "cpu"):
        assert each.error("triton") < TOLERANCE, each.name
        assert launched_problem(each) == compiled_variants(case)[each.name].problem, each.name


MASKED_SHAPES = (
    # tokens, in, out, rank
    (33, 65, 47, 5),
    (1, 16, 16, 16),
    (5, 7, 9, 1),
    (0, 7, 9, 3),
    (70, 40, 130, 20),
)


def masked(dtype: torch.dtype, adapters: torch.dtype, shape: tuple[int, ...], strided: bool) -> None:
    """Forward and both gradients, through the autograd formula, against fp64 on the weight as it is rounded."""
    tokens, width, out, rank = shape
    weight = drawn(width, out, seed=1, dtype=dtype).t() if strided else drawn(out, width, seed=1, dtype=dtype)
    weight[torch.rand(out, width, generator=torch.Generator().manual_seed(5)) < 0.5] = 0
    a, b = drawn(rank, width, seed=6, dtype=adapters), drawn(out, rank, seed=7, dtype=adapters)
    bias = None if strided else drawn(out, seed=8, dtype=dtype)
    x = drawn(width, tokens, seed=2, dtype=dtype).t() if strided else drawn(tokens, width, seed=2, dtype=dtype)
    x, a, b = (each.requires_grad_() for each in (x, a, b))
    y = masked_linear(x, weight, a, b, bias, 0.75, "exact", "triton")
    assert y.dtype == dtype
    d_y = drawn(*y.shape, seed=4, dtype=dtype)
    wide = [None if each is None else each.detach().double() for each in (weight, a, b, bias)]
    merged = masked_weight(weight, a, b, 0.75, dtype).detach().double()
    expected = torch.nn.functional.linear(x.detach().double(), merged, wide[3])
    assert_close_rms(y, expected, name="forward")
    d_x, d_a, d_b = torch.autograd.grad(y, (x, a, b), d_y)
    assert_close_rms(d_x, d_y.double() @ merged, name="input gradient")
    for found, want in zip(
        (d_a, d_b), exact_gradients(d_y.double(), x.detach().double(), *wide[:3], 0.75), strict=True
    ):
        assert_close_rms(found, want, dtype, name="adapter gradient")


def whole_model(autocast: bool) -> None:
    """A sparse block and the layers around it, from the graph to the gradients, by nothing but generated kernels."""
    model = Head(lora(8, 8), GatedMLP()).float()
    inputs = tokens(rows=3)
    found = {}
    for kernels in ("measured", "triton"):
        config = SparseLoRAConfig(layer_sparsity={"body.1": 0.5}, kernels=kernels)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            ran = run_rewritten(model, *inputs, config=config)
        found[kernels] = (ran, gradients_of(ran.value, model))
    ran, gradients = found["triton"]
    assert ran.ctx.results.providers == {"body.1": ("triton",)}, ran.ctx.results.providers
    assert next(record for record in ran.result.records if record.name == "fuse_products").stats["fused"] == 2
    assert next(record for record in ran.result.records if record.name == "fuse_adapted_layers").stats["fused"] >= 4
    (other, expected) = found["measured"]
    # Autocast rounds every operation of the composed path, and the interpreter cuts bf16 numbers that a GPU rounds.
    cut = Tolerance(max=0.2, rms=0.05, why="Twice the error of a rounding, in as many of them as the table allows for.")
    dtype, tolerance = (torch.bfloat16, cut) if autocast else (torch.float32, None)
    assert_close_rms(ran.value, other.value, dtype, tolerance=tolerance)
    for name, gradient in gradients.items():
        assert_close_rms(gradient, expected[name], dtype, tolerance=tolerance, name=name)


def whole_decoder() -> None:
    """A sparse attention block as well, whose predictor is a kernel: it chooses what the composed predictor chooses."""
    model = fp64_decoder(dtype=torch.float32, layers=2)
    ids, labels = (batch(61, padding="left")[name] for name in ("input_ids", "labels"))
    found = {}
    for kernels in ("measured", "triton"):
        config = SparseLoRAConfig(layer_sparsity={"layers.0.self_attn": 0.5, "layers.0.mlp": 0.5}, kernels=kernels)
        with record_channels() as record:
            ran = run_rewritten(model, ids, labels, config=config)
        found[kernels] = (ran, record, gradients_of(ran.value[0], model))
    (ran, record, gradients), (_, expected_record, expected) = found["triton"], found["measured"]
    assert set(ran.ctx.results.providers.values()) == {("triton",)}, ran.ctx.results.providers
    (scores,) = (each for each in ran.result.records if each.name == "fuse_scores")
    assert scores.stats["fused"] == 1
    assert set(record) == set(expected_record) and len(record) == 3
    for site, (channels,) in record.items():
        assert torch.equal(channels, expected_record[site][0]), site
    for name, gradient in gradients.items():
        assert_close_rms(gradient, expected[name], torch.float32, name=name)


class GatedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = lora(8, 40, bias=True), lora(8, 40, bias=True), lora(40, 8)
        frozen(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    for dtype, shape, strided in itertools.product(DTYPES, SHAPES, (False, True)):
        name = f"gathered {str(dtype)[6:]} {'x'.join(map(str, shape))}{' strided' if strided else ''}"
        yield name, partial(gathered, dtype, shape, strided)
    for name, formula in FORMULAS.items():
        for dtype in DTYPES[:2]:
            yield f"fused {name} {str(dtype)[6:]}", partial(fused, formula, dtype, SHAPES[0])
    for shape in SHAPES:
        name = "x".join(map(str, shape))
        yield f"fused {name}", partial(fused, FORMULAS["swiglu, adapters, bias"], torch.float16, shape)
        yield f"fused, inputs gathered {name}", partial(fused, FORMULAS["sum"], torch.float32, shape, 1)
    yield from triton_4bit_cases.cases()
    for dtype, shape in itertools.product(DTYPES, SHAPES):
        yield f"whole weight {str(dtype)[6:]} {'x'.join(map(str, shape))}", partial(whole_weight, dtype, shape)
    pairs = ((torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16))
    for (dtype, adapters), shape in itertools.product(pairs, MASKED_SHAPES):
        for strided in (False, True)[: 2 if dtype == torch.float32 else 1]:
            name = f"masked {dtype} {adapters} {'x'.join(map(str, shape))}{' strided' if strided else ''}"
            yield name, partial(masked, dtype, adapters, shape, strided)
    yield from triton_token_cases.cases()
    for case in (
        other_weight_dtype, gradients_of_strided, in_kernel_index_loads, one_tile_of_registers_for_a_sum,
        tile_of_a_table, kernels_of_the_benchmarks,
    ):  # fmt: skip
        yield case.__name__, case
    yield "whole decoder", whole_decoder
    for autocast in (False, True):
        yield f"whole model{' under autocast' if autocast else ''}", partial(whole_model, autocast)


if __name__ == "__main__":
    torch.set_num_threads(1)
    kinds: set[str] = set()
    for name, case in cases():
        kind = name.partition(" ")[0]
        if "--one-of-each-kind" in sys.argv and kind in kinds:
            continue
        kinds.add(kind)
        try:
            case()
        except Exception as error:
            print(f"FAILED {name}: {type(error).__name__}: {error}".replace("\n", " "), flush=True)  # noqa: T201
        else:
            print(f"ok {name}", flush=True)  # noqa: T201
    sys.exit(0)
