"""Scores of a feed-forward block's channels on an NVIDIA GPU, by two kernels generated for the block's formula.

Run under Triton's interpreter and compiled ahead of time in tests; not yet measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sparse_compile.kernels.codegen.score_source import ScoreSpec, score_source
from sparse_compile.kernels.triton_launch import on_device_of
from sparse_compile.torch_private.inductor import load_source

_LEAST_SHARE = 512
"""Channels of x that a program is worth starting for."""

_PROGRAMS = 64
"""Programs that are enough to read x: more shares would only be more sums to add up."""

_MOST_PARTS = 16
"""Shares whose sums every program of the second kernel adds up, at most."""


@dataclass(frozen=True)
class ScoreSizes:
    """How scores are cut up.

    Attributes:
        m: rows that a program holds at once.
        k: channels of a tile of x.
        n: channels of the result that a program computes.
        share: channels of x that a program of the first kernel sums over, a multiple of `k`.
        parts: shares of a row.
        warps: of a program.
    """

    m: int
    k: int
    n: int
    share: int
    parts: int
    warps: int


def score_sizes(rows: int, depth: int, ranks: Sequence[int]) -> ScoreSizes:
    """Return the sizes for some rows of `depth` channels, and factors of some ranks."""
    m, k = 32, 64
    parts = max(1, min(depth // _LEAST_SHARE, _MOST_PARTS, _PROGRAMS // max(1, -(-rows // m))))
    share = -(-depth // (parts * k)) * k
    is_wide = max(ranks) > 32  # then factors fill the registers that rows and channels would
    return ScoreSizes(
        m=m, k=k, n=32 if is_wide else 64, share=share, parts=-(-depth // share), warps=8 if is_wide else 4
    )


def predicted_scores(
    x: Tensor,
    valid: Tensor,
    a_factors: Sequence[Tensor],
    b_factors: Sequence[Tensor],
    vectors: Sequence[Tensor],
    formula: str,
) -> Tensor:
    """See `reference.predicted_scores`; the same to the last bit in every run."""
    (rows, depth), columns = x.shape, b_factors[0].shape[1]
    spec = ScoreSpec(tuple(factor.shape[0] for factor in b_factors), len(vectors), formula)
    sizes = score_sizes(rows, depth, spec.ranks)
    scores = x.new_empty(columns, dtype=torch.float32)
    thin: dict[str, Any] = {
        f"thin_{name}": x.new_empty(sizes.parts, rows, rank, dtype=torch.float32) for name, rank in spec.terms.items()
    }
    kernels = _kernels(spec)
    with on_device_of(x):
        if rows:
            kernels.thin_products[(-(-rows // sizes.m), sizes.parts)](
                x=x, **_matrices("a", spec, a_factors), **thin, rows=rows, depth=depth, share=sizes.share,
                x_row=x.stride(0), x_col=x.stride(1), BLOCK_M=sizes.m, BLOCK_K=sizes.k, num_warps=sizes.warps,
            )  # fmt: skip
        kernels.scores[(-(-columns // sizes.n),)](
            valid=valid.contiguous(), **thin, **_matrices("b", spec, b_factors),
            **{f"vector_{i}": each.reshape(-1).expand(columns).contiguous() for i, each in enumerate(vectors)},
            y=scores, rows=rows, columns=columns, parts=sizes.parts, BLOCK_M=sizes.m, BLOCK_N=sizes.n,
            num_warps=sizes.warps,
        )  # fmt: skip
    return scores


@lru_cache(maxsize=1024)
def _kernels(spec: ScoreSpec) -> ModuleType:
    return load_source(score_source(spec))


def _matrices(kind: str, spec: ScoreSpec, factors: Sequence[Tensor]) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for name, factor in zip(spec.terms, factors, strict=True):
        arguments |= {f"{kind}_{name}": factor}
        arguments |= {f"{kind}_{name}_row": factor.stride(0), f"{kind}_{name}_col": factor.stride(1)}
    return arguments
