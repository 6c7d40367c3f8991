"""Gathered products on an NVIDIA GPU by a Triton kernel that loads the chosen channels by index.

Run under Triton's interpreter and compiled ahead of time in tests; not yet measured on a GPU.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from sparse_compile.kernels.gathered_linear.tiles import Gather, Problem, Tile, choose_tile


def gathered_linear(x: Tensor, weight: Tensor, channels: Tensor) -> Tensor:
    """See `reference.gathered_linear`."""
    return _product(x, weight, channels, gathered=0)


def gathered_input_linear(h: Tensor, weight: Tensor, channels: Tensor) -> Tensor:
    """See `reference.gathered_input_linear`."""
    return _product(h, weight, channels, gathered=1)


def _product(x: Tensor, weight: Tensor, channels: Tensor, *, gathered: int) -> Tensor:
    columns = channels.numel() if gathered == 0 else weight.shape[0]
    problem = Problem(
        rows=x.shape[0],
        columns=columns,
        depth=x.shape[1],
        itemsize=x.element_size(),
        capability=torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0),
        scattered=weight.stride(gathered) < weight.stride(1 - gathered),
    )
    tile = choose_tile(problem)
    gather: Gather = "rows" if gathered == 0 else "depth"
    if tile.pack:
        weight, gather = weight.index_select(gathered, channels), "none"
    y = x.new_empty(x.shape[0], columns)
    if y.numel():
        launch(x, weight, channels, y, gather, tile)
    return y


def launch(x: Tensor, weight: Tensor, channels: Tensor, y: Tensor, gather: Gather, tile: Tile) -> None:
    """Run the kernel: y = x @ M.T, M as `gather` says.

    Args:
        x: (rows, depth).
        weight: (out, in), of any strides.
        channels: int64 indices into `weight`.
        y: (rows, columns), contiguous, at least one element.
        gather: which dimension of the weight is indexed.
        tile: how to cut the product up.
    """
    import triton

    from sparse_compile.kernels.gathered_linear.triton_kernels import gathered_product

    rows, columns = y.shape
    # TF32 only where the user asked for it, as with PyTorch's own products.
    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    grid = (triton.cdiv(rows, tile.m) * triton.cdiv(columns, tile.n),)
    # Triton launches on the current device; under its interpreter there is none.
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        gathered_product[grid](
            x, weight, channels, y, rows, columns, x.shape[1], x.stride(0), x.stride(1), *weight.stride(),
            GATHER=gather, PRECISION=precision, INTERPRETED=triton.knobs.runtime.interpret,
            BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, GROUP=tile.group,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
