"""Prediction and choice of channels on an NVIDIA GPU: two kernels for norms, and one where a sort is a dozen.

Run under Triton's interpreter and compiled ahead of time in tests; not yet measured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_compile.kernels.providers import OpCall, triton_runs
from sparse_compile.kernels.triton_launch import on_device_of

_CHUNK = 4096
"""Scores, or elements of Gram matrices, that a program holds at once, at most."""

_LARGEST_RANK = 63
"""Of factors whose Gram matrix, with a bias' row and column, stays in registers beside a tile of B."""


@dataclass(frozen=True)
class NormSizes:
    """How predicted norms are cut up.

    Attributes:
        m, k: rows and channels of a tile of x.
        r: rank, padded to a power of two and, with a bias, for one more row.
        n: channels of the result that a program computes.
        chunk: partial Gram matrices that are added at once.
        warps: of a program.
    """

    m: int
    k: int
    r: int
    n: int
    chunk: int
    warps: int


def norm_sizes(rank: int, *, has_bias: bool) -> NormSizes:
    """Return the sizes for factors of a rank."""
    r = max(16, 1 << (rank + has_bias - 1).bit_length())
    return NormSizes(m=32, k=64, r=r, n=64, chunk=max(1, _CHUNK // r**2), warps=4 if r <= 32 else 8)


def factors_declined(call: OpCall) -> str | None:
    """Say why predictions from factors are not computed by Triton kernels, or return None where they are."""
    if call.rank > _LARGEST_RANK:
        return f"keeps factors of rank {_LARGEST_RANK} at most in registers, these have {call.rank}"
    return triton_runs(call)


def predicted_norms(x: Tensor, weights: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """See `reference.predicted_norms`; the same to the last bit in every run."""
    from sparse_compile.kernels.channel_selection.triton_kernels import gram_partials, norms_of_gram

    (rows, depth), (rank, columns) = x.shape, b.shape
    sizes, has_bias = norm_sizes(rank, has_bias=bias is not None), bias is not None
    partials = -(-rows // sizes.m)
    grams = x.new_empty(partials, sizes.r, sizes.r, dtype=torch.float32)
    norms = x.new_empty(columns, dtype=torch.float32)
    with on_device_of(x):
        if partials:
            gram_partials[(partials,)](
                x, weights.contiguous(), a, grams, rows, depth, *x.stride(), *a.stride(),
                RANK=rank, HAS_BIAS=has_bias, BLOCK_M=sizes.m, BLOCK_K=sizes.k, BLOCK_R=sizes.r,
                num_warps=sizes.warps,
            )  # fmt: skip
        norms_of_gram[(-(-columns // sizes.n),)](
            grams, b, None if bias is None else bias.contiguous(), norms, partials, columns, *b.stride(),
            RANK=rank, HAS_BIAS=has_bias, CHUNK=sizes.chunk, BLOCK_N=sizes.n, BLOCK_R=sizes.r,
            num_warps=sizes.warps,
        )  # fmt: skip
    return norms


def top_channels(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `reference.top_channels`; for fp32 scores that are not negative, such as norms."""
    from sparse_compile.kernels.channel_selection.triton_kernels import largest_channels

    assert scores.dtype == torch.float32, f"the order of {scores.dtype} numbers is not that of 32-bit integers"
    channels = scores.new_empty(k, dtype=torch.int64)
    informative = scores.new_empty((), dtype=torch.int32)
    chunk, warps = launch_sizes(scores.numel())
    with on_device_of(scores):
        largest_channels[(1,)](
            scores.contiguous(), channels, informative, scores.numel(), k, CHUNK=chunk, num_warps=warps
        )  # fmt: skip
    return channels, informative.bool()


def launch_sizes(channels: int) -> tuple[int, int]:
    """Return how many scores the program holds at once, a power of two, and its warps."""
    chunk = min(_CHUNK, max(32, 1 << (channels - 1).bit_length()))
    return chunk, min(16, max(1, chunk // 64))
