"""Weights to factorise, and what their factors are compared by."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sparse_compile.predictor.svd import LowRankFactors

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def random_weight(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def low_rank_weight(out_features: int, in_features: int, rank: int, dtype: torch.dtype) -> Tensor:
    left = random_weight(out_features, rank, dtype=torch.float64)
    return (left @ random_weight(rank, in_features, dtype=torch.float64, seed=1)).to(dtype)


def product(found: LowRankFactors) -> Tensor:
    """The weight, (out, in), that the factors stand for."""
    return (found.a @ found.b).mT


def identical(left: LowRankFactors, right: LowRankFactors) -> bool:
    return torch.equal(left.a, right.a) and torch.equal(left.b, right.b)


def entries(cache: Path) -> list[Path]:
    """What a cache folder holds, beside the files that processes lock."""
    return [path for path in cache.iterdir() if path.suffix != ".lock"]
