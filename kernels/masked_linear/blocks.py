"""Masked products a block at a time: neither the masked weight nor its gradient ever exists as a whole.

A block of rows (forward, exact gradients) or of columns (gradient of the input) is merged, masked and multiplied while
it is in the cache. Blocks of columns serve the gradient of the input because they are put side by side, where blocks
of rows would be added up, which rounds bf16 once for each block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparse_compile.kernels.cpu_gemm import onednn_declines
from sparse_compile.kernels.dtypes import at_least_fp32
from sparse_compile.kernels.masked_linear.reference import masked_weight
from sparse_compile.torch_private.aten import onednn_linear

# Elements of a block: 4 MB of fp32 stay in a core's caches, and a product with fewer columns is slower (measured: half
# as many cost 5 to 15% more, twice as many as much). On a GPU fewer, larger blocks are fewer launches.
_BLOCK = {"cpu": 2**20}
_BLOCK_ELSEWHERE = 2**24
_LEAST = 64
"""Rows or columns of the smallest block: a narrower product would run far below the speed of a square one."""


def masked_linear(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """See `reference.masked_linear`."""
    y = x.new_empty(x.shape[0], weight.shape[0])
    for rows in _blocks(weight, 0):
        block = masked_weight(weight[rows], a, b[rows], scale, x.dtype)
        y[:, rows] = _product(x, block, None if bias is None else bias[rows].to(x.dtype))
    return y


def masked_input_gradient(d_y: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """See `reference.masked_input_gradient`."""
    d_x = d_y.new_empty(d_y.shape[0], weight.shape[1])
    for columns in _blocks(weight, 1):
        block = masked_weight(weight[:, columns], a[:, columns], b, scale, d_y.dtype)
        d_x[:, columns] = _product(d_y, block.t(), None)
    return d_x


def _product(x: Tensor, block: Tensor, bias: Tensor | None) -> Tensor:
    """Return `x block' + bias`, on a CPU by the faster library."""
    if x.device.type != "cpu" or onednn_declines(x.dtype, block.shape[0]):
        return linear(x, block, bias)
    y = onednn_linear(x, block)
    return y if bias is None else y.add_(bias)


def exact_gradients(
    d_y: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """See `reference.exact_gradients`."""
    dtype = at_least_fp32(x, a, b)
    wide_a, wide_b = a.to(dtype), b.to(dtype)
    d_a, d_b = torch.zeros_like(wide_a), torch.empty_like(wide_b)
    for rows in _blocks(weight, 0):
        g = torch.mm(d_y[:, rows].t(), x).masked_fill_(weight[rows] == 0, 0).to(dtype)
        d_a.addmm_(wide_b[rows].t(), g, alpha=scale)
        d_b[rows] = scale * (g @ wide_a.t())
    return d_a.to(a.dtype), d_b.to(b.dtype)


def _blocks(weight: Tensor, dim: int) -> Iterator[slice]:
    """Cut a dimension of a weight into blocks of about as many elements as stay in a cache."""
    size = _BLOCK.get(weight.device.type, _BLOCK_ELSEWHERE) // max(1, weight.shape[1 - dim])
    step = max(_LEAST, size)
    for start in range(0, weight.shape[dim], step):
        yield slice(start, min(start + step, weight.shape[dim]))
