"""Semantic op that hands on what a block reads and returns, for statistics."""

from sparse_compile.kernels.observed_rows.op import observe_rows
from sparse_compile.kernels.observed_rows.registry import observing

__all__ = ["observe_rows", "observing"]
