"""What a preset asks of a site, by its place in the model."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Literal

PRESETS = ("none", "exact", "o1", "o2", "auto")

AUTO_RANK = 64
"""Rank of the maps that preset `auto` fits, at most a quarter of the width of a block's input."""

AUTO_DENSE_EVERY = 8
"""Which step of the sparse phase is dense under preset `auto`: this one of so many."""

AUTO_EXIT = 0.5
"""Where context tokens leave the residual stream under preset `auto`, as a fraction of the depth; 1 is nowhere.

Held-out loss above the dense run's, means of three seeds of 300 steps: at 0.5 +.0063 on E2E and +.0030 on GSM8K, at 1
+.0041 and +.0027. At 0.25, one seed: +.039 and +.003 (`docs/recipes.md`).
"""

DEFAULT_START_FRACTION = 0.05
"""Where sparsity starts unless the user says otherwise, as a fraction of the run (the paper's first 5-10%)."""

DEFAULT_START_STEPS = 20
"""Where sparsity starts in a run of unknown length: 5% of 400 optimizer steps, the length of a short fine-tuning."""


def preset_sparsity(preset: str, kind: Literal["ffn", "attention"], index: int, count: int) -> float:
    """Return the sparsity that a preset gives to one site of a model that nobody tuned.

    Blocks are chosen by depth, [lo, hi) on ``index / count``; the first and the last block are always dense. ``o1``:
    FFN 0.97 and attention 0.2 on [0.53, 0.97). ``o2``: FFN 0.99 on [0.09, 0.97), attention 0.75 on [0.43, 0.97).
    Source: the published schedules of LLaMA3-8B (32 blocks) for CSR170K and Math10K. ``auto`` chooses no channels.

    Args:
        preset: One of :data:`PRESETS`.
        kind: The kind of the site.
        index: Order of the block in its stack, from 0.
        count: Number of blocks in the stack.
    """
    assert preset in PRESETS, preset
    assert 0 <= index < count, (index, count)
    if preset in ("none", "exact", "auto") or index in (0, count - 1):
        return 0.0
    low, high, sparsity = _PRESET_DEPTHS[preset, kind]
    # Fractions, because a border such as 0.97 is no binary number and 97/100 must lie outside of it.
    return sparsity if low <= Fraction(index, count) < high else 0.0


_PRESET_DEPTHS = {
    ("o1", "ffn"): (Fraction(53, 100), Fraction(97, 100), 0.97),
    ("o1", "attention"): (Fraction(53, 100), Fraction(97, 100), 0.2),
    ("o2", "ffn"): (Fraction(9, 100), Fraction(97, 100), 0.99),
    ("o2", "attention"): (Fraction(43, 100), Fraction(97, 100), 0.75),
}


def exit_block(depth: float, count: int) -> int:
    """Return the block before which context tokens leave the residual stream; ``count`` where they stay to the end.

    Args:
        depth: Fraction of the blocks that they run through, in [0, 1]; they run through the first block at least.
        count: Number of blocks in the stack.
    """
    return count if depth == 1 else min(max(1, round(depth * count)), count)


def match_site(pattern: str, name: str) -> bool:
    """Say whether ``pattern`` is ``name`` or a suffix of it in whole dotted parts (``1.mlp`` is not ``11.mlp``)."""
    return bool(pattern) and (name == pattern or name.endswith(f".{pattern}"))


def kept_count(n: int, sparsity: float) -> int:
    """Return how many of ``n`` channels stay at a sparsity in [0, 1): ``max(1, n - floor(n * sparsity))``.

    The product is exact in the decimal number that the user wrote: 0.29 of 1000 is 290, not 289.
    """
    assert n >= 1, n
    assert 0 <= sparsity < 1, sparsity
    return max(1, n - math.floor(n * Fraction(repr(float(sparsity)))))
