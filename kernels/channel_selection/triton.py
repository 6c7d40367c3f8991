"""The choice of channels on an NVIDIA GPU: one kernel, where a sort and what is around it are a dozen.

Run under Triton's interpreter and compiled ahead of time in tests; not yet measured on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.kernels.triton_launch import on_device_of

_CHUNK = 4096
"""Scores that a program holds at once, at most."""


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
