"""Fused products on an NVIDIA GPU, by kernels that are generated for the formula.

Run under Triton's interpreter and compiled ahead of time in tests; not yet measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sparse_compile.kernels.codegen.formula import parsed
from sparse_compile.kernels.codegen.packed_tiles import FourBit
from sparse_compile.kernels.codegen.triton_source import (
    Gather,
    GradientSpec,
    ProductSpec,
    Term,
    gradient_source,
    product_source,
)
from sparse_compile.kernels.dequantize_4bit.packed import packed_weights
from sparse_compile.kernels.fused_linear.layout import aligned, empty_rows
from sparse_compile.kernels.fused_linear.operands import channels_by_product, frozen_operand, is_scattered, out_features
from sparse_compile.kernels.fused_linear.reference import saves_products
from sparse_compile.kernels.fused_linear.tiles import Problem, Tile, choose_tile
from sparse_compile.kernels.fused_linear.tuned import tile_for
from sparse_compile.kernels.triton_launch import capability_of, on_device_of, product_precision
from sparse_compile.torch_private.inductor import load_source


def fused_linear(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    channels: Sequence[Tensor],
    reads: Sequence[int],
    dims: Sequence[int],
    thins: Sequence[Tensor],
    factors: Sequence[Tensor],
    vectors: Sequence[Tensor],
    formula: str,
    dtype: torch.dtype,
    scales: Sequence[Tensor],
    formats: str,
) -> list[Tensor]:
    """See `reference.fused_linear`."""
    rows = xs[0].shape[0]
    stored = packed_weights(weights, scales, formats)
    columns = channels[0].numel() if dims[0] == 0 else out_features(stored[0])
    scattered = [is_scattered(weight, dim) for weight, dim in zip(stored, dims, strict=True)]
    problem = Problem(rows, columns, max(x.shape[1] for x in xs), xs[0].element_size(), capability_of(xs[0]),
                      products=len(weights) + len(thins), scattered=any(scattered))  # fmt: skip
    # Tables are measured with dense weights: in 4 bits other tiles fit into the registers.
    tile = choose_tile(problem) if formats else tile_for(problem)
    operands = [
        frozen_operand(weight, chosen, dim, xs[0].dtype, copied=tile.pack)
        for weight, chosen, dim in zip(stored, channels_by_product(channels, dims), dims, strict=True)
    ]
    spec = product_spec(
        reads, [operand.gather for operand in operands], len(thins), len(vectors), formula,
        [operand.four_bit for operand in operands],
    )  # fmt: skip
    y = empty_rows(xs[0], rows, columns, dtype)
    saved = [empty_rows(xs[0], rows, columns) for _ in spec.saves]
    if not y.numel():
        return [y, *saved]
    arguments: dict[str, Any] = {"y": y, "rows": rows, "columns": columns, "y_row": y.stride(0)}
    for index, x in enumerate((*xs, *thins)):
        arguments |= _matrix(f"x_{index}", x) | {f"depth_{index}": x.shape[1]}
    for term, operand in zip(spec.terms, operands, strict=False):
        arguments |= operand.arguments(term.name)
    for index, factor in enumerate(factors):
        arguments |= _matrix(f"w_t{index}", factor)
    arguments |= {f"vector_{index}": vector.expand(columns).contiguous() for index, vector in enumerate(vectors)}
    arguments |= {f"saved_{name}": each for name, each in zip(spec.saves, saved, strict=True)}
    programs = -(-rows // tile.m) * -(-columns // tile.n)
    _launch(_product_kernel(spec), (programs,), arguments | {"GROUP": tile.group, "BLOCK_K": tile.k}, tile, xs[0])
    return [y, *saved]


def fused_linear_gradients(
    d_y: Tensor,
    products: Sequence[Tensor],
    thins: Sequence[Tensor],
    factors: Sequence[Tensor],
    vectors: Sequence[Tensor],
    formulas: str,
    dtype: torch.dtype,
) -> list[Tensor]:
    """See `reference.fused_linear_gradients`."""
    rows, columns = d_y.shape
    texts = tuple(formulas.split(";"))
    results = [empty_rows(d_y, rows, columns, dtype) for _ in texts]
    if not d_y.numel():
        return results
    # Thin products that no derivative reads are not computed again.
    spec = gradient_spec(len(products), len(thins), len(vectors), texts)
    arguments: dict[str, Any] = {"d_y": d_y, "d_y_row": d_y.stride(0), "d_y_column": d_y.stride(1)}
    arguments |= {"rows": rows, "columns": columns, "y_row": results[0].stride(0)}
    arguments |= {f"saved_{name}": aligned(products[int(name[1:])]) for name in spec.saved}
    for position, name in enumerate(spec.thin):
        thin, factor = thins[int(name[1:])], factors[int(name[1:])]
        arguments |= _matrix(f"x_{position}", thin) | {f"depth_{position}": thin.shape[1]}
        arguments |= _matrix(f"w_{name}", factor)
    arguments |= {f"vector_{index}": vector.expand(columns).contiguous() for index, vector in enumerate(vectors)}
    arguments |= {f"gradient_{index}": each for index, each in enumerate(results)}
    depth = max((thins[int(name[1:])].shape[1] for name in spec.thin), default=0)
    tile = tile_for(Problem(rows, columns, depth, d_y.element_size(), capability_of(d_y), products=len(texts),
                            kernel="gradients"))  # fmt: skip
    grid = (-(-rows // tile.m), -(-columns // tile.n))
    _launch(_gradient_kernel(spec), grid, arguments | {"BLOCK_K": tile.k}, tile, d_y)
    return results


def product_spec(
    reads: Sequence[int],
    gathers: Sequence[int | str],
    thins: int,
    vectors: int,
    formula: str,
    packed: Sequence[FourBit | None] = (),
) -> ProductSpec:
    """Return what is to be generated for a call.

    Args:
        reads: for each frozen product, the index of its x.
        gathers: for each, the dimension of the weight that is indexed in the kernel, or `"none"`.
        thins: number of thin products; each has an x of its own, behind the others'.
        vectors: number of operands of one value a channel.
        formula: its text.
        packed: for each frozen product, how its weight is stored; all are dense where nothing is given.
    """
    names: dict[int | str, Gather] = {0: "rows", 1: "depth", "none": "none"}
    frozen = zip(reads, gathers, packed or [None] * len(reads), strict=True)
    terms = [Term(f"p{i}", read, names[gather], form) for i, (read, gather, form) in enumerate(frozen)]
    inputs = max(reads) + 1
    terms += [Term(f"t{j}", inputs + j, "none") for j in range(thins)]
    saves = tuple(f"p{i}" for i in range(len(reads))) if saves_products(formula) else ()
    return ProductSpec(tuple(terms), vectors, formula, saves)


@lru_cache(maxsize=1024)
def gradient_spec(products: int, thins: int, vectors: int, formulas: tuple[str, ...]) -> GradientSpec:
    """Return what is to be generated for the derivatives of a formula: only what they read is loaded or computed."""
    read = {operand for text in formulas for operand in parsed(text).operands}
    saved = tuple(name for name in (f"p{i}" for i in range(products)) if name in read)
    thin = tuple(name for name in (f"t{j}" for j in range(thins)) if name in read)
    return GradientSpec(saved, thin, vectors, formulas)


@lru_cache(maxsize=1024)
def _product_kernel(spec: ProductSpec) -> Callable[..., Any]:
    return load_source(product_source(spec)).products  # type: ignore[no-any-return]


@lru_cache(maxsize=1024)
def _gradient_kernel(spec: GradientSpec) -> Callable[..., Any]:
    return load_source(gradient_source(spec)).gradients  # type: ignore[no-any-return]


def _matrix(name: str, matrix: Tensor) -> dict[str, Any]:
    return {name: matrix, f"{name}_row": matrix.stride(0), f"{name}_col": matrix.stride(1)}


def _launch(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], tile: Tile, x: Tensor) -> None:
    import triton

    with on_device_of(x):
        kernel[grid](
            **arguments, PRECISION=product_precision(), INTERPRETED=triton.knobs.runtime.interpret,
            BLOCK_M=tile.m, BLOCK_N=tile.n, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
