"""Semantic op that hands on what a block reads and returns (docs/recipes.md, "Preset `auto`").

Nobody may want the rows: that is known to the process, not to the graph, so it costs a look-up and no work on a device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.kernels.observed_rows.registry import observer_of


# A CUDA graph would replay the answer to who wants the rows.
@torch.library.custom_op("sparselora::observe_rows", mutates_args=("seen",), tags=torch.Tag.cudagraph_unsafe)
def observe_rows(x: Tensor, y: Tensor, rows: Tensor, scored: Tensor, seen: Tensor, key: str) -> None:
    """Hand on those of some rows that are of context tokens, if someone wants them.

    Args:
        x: (n, in), what a block reads of some tokens.
        y: (n, out), what it returns.
        rows: (n,) int64, which tokens they are; -1 for a spare row.
        scored: (N,) bool, true at context tokens that are no padding.
        seen: int64 without dimensions: the number of rows handed on is added. It is also what keeps the call from being
            taken for one without an effect.
        key: of the site.
    """
    observer = observer_of(key)
    if observer is None:
        return
    wanted = scored[rows] & (rows >= 0)
    seen += wanted.sum()
    observer(x[wanted], y[wanted])


@observe_rows.register_fake
def _(x: Tensor, y: Tensor, rows: Tensor, scored: Tensor, seen: Tensor, key: str) -> None:
    return None
