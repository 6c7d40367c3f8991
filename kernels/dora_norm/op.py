"""A semantic op for DoRA's norm (arXiv 2402.09353, section 4.3, where it is a constant: it has no gradient).

    dora_norm(W, A, B, s)_j = || W_j + s (B A)_j ||_2

Neither B A nor a cast of W ever exists as a whole: a block of rows at a time is formed, in cache, so W is read once.
The expansion ||W_j||^2 + 2s <(W A^T)_j, B_j> + s^2 <(B A A^T)_j, B_j> forms no block either. It costs as many FLOPs,
and loses digits where W and s B A cancel: relative to the norm it errs by (||W_j|| / norm)^2 roundings, which leaves no
digit of a row that an adapter has brought near zero. A block errs by ||W_j|| / norm roundings, as the sum itself does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.kernels.dtypes import at_least_fp32

# Elements of a block: 2 MB of fp32 stay in a core's cache; on a GPU fewer, larger blocks are fewer launches.
_BLOCK = {"cpu": 2**19}
_BLOCK_ELSEWHERE = 2**24


@torch.library.custom_op("sparselora::dora_norm", mutates_args=())
def dora_norm(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return the L2 norm of each row of `W + s B A`; see `reference.dora_norm`.

    Args:
        weight: (out, in), frozen.
        a: (r, in).
        b: (out, r).
        scale: s.

    Returns:
        (out,), of the widest dtype of the operands, fp32 at least; not differentiated.
    """
    dtype = at_least_fp32(weight, a, b)
    norms = torch.empty(weight.shape[0], dtype=dtype, device=weight.device)
    rows = max(1, _BLOCK.get(weight.device.type, _BLOCK_ELSEWHERE) // max(1, weight.shape[1]))
    a = a.to(dtype)
    with torch.autocast(weight.device.type, enabled=False):
        for start in range(0, weight.shape[0], rows):
            block = slice(start, start + rows)
            merged = torch.addmm(weight[block].to(dtype), b[block].to(dtype), a, alpha=scale)
            torch.linalg.vector_norm(merged, dim=1, out=norms[block])
    return norms


@dora_norm.register_fake
def _(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return weight.new_empty(weight.shape[0], dtype=at_least_fp32(weight, a, b))
