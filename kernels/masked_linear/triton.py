"""Masked products on an NVIDIA GPU by a Triton kernel that merges and masks a tile of the weight as it is loaded.

The masked weight never exists in memory; each tile of tokens merges it again. Run under Triton's interpreter and
compiled ahead of time in tests; not yet measured on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.kernels.fused_linear.tiles import Problem, Tile, choose_tile
from sparse_compile.kernels.triton_launch import capability_of, on_device_of, product_precision


def masked_linear(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """See `reference.masked_linear`."""
    return _product(x, weight, b, a, bias, scale)


def masked_input_gradient(d_y: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """See `reference.masked_input_gradient`."""
    return _product(d_y, weight.t(), a.t(), b.t(), None, scale)


def masked_tile(problem: Problem) -> Tile:
    """Return the tile of a product: a merged tile of the weight, in fp32, stays in registers beside the sums."""
    tile = choose_tile(problem)
    return Tile(tile.m, min(tile.n, 64), min(tile.k, 32), tile.warps, min(tile.stages, 3))


def _product(x: Tensor, weight: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    y = x.new_empty(x.shape[0], weight.shape[0])
    tile = masked_tile(Problem(x.shape[0], weight.shape[0], x.shape[1], x.element_size(), capability_of(x)))
    if y.numel():
        launch(x, weight, left, right, bias, scale, y, tile)
    return y


def launch(
    x: Tensor, weight: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, scale: float, y: Tensor, tile: Tile
) -> None:
    """Run the kernel: y = x @ ((W + s L R) * (W != 0)).T + bias.

    Args:
        x: (rows, depth).
        weight: W, (columns, depth), of any strides.
        left: L, (columns, r).
        right: R, (r, depth).
        bias: (columns,), or None.
        scale: s.
        y: (rows, columns), contiguous, at least one element.
        tile: how to cut the product up.
    """
    import triton

    from sparse_compile.kernels.masked_linear.triton_kernels import masked_product

    factors = torch.promote_types(left.dtype, right.dtype)
    left, right = left.to(factors), right.to(factors)
    bias = None if bias is None else bias.contiguous()
    rows, columns = y.shape
    rank = right.shape[0]
    grid = (triton.cdiv(rows, tile.m) * triton.cdiv(columns, tile.n),)
    with on_device_of(x):
        masked_product[grid](
            x, weight, left, right, bias, y, rows, columns, x.shape[1], scale,
            *x.stride(), *weight.stride(), *left.stride(), *right.stride(),
            RANK=rank, HAS_BIAS=bias is not None, PRECISION=product_precision(),
            INTERPRETED=triton.knobs.runtime.interpret,
            BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, BLOCK_R=max(16, triton.next_power_of_2(rank)),
            GROUP=tile.group, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
