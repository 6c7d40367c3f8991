"""What a training step costs, and what maps would save of it: in seconds of this machine, or in FLOPs.

Each distinct block is timed once, and each map in its place, with the tokens of a real batch. What is expected of a
recipe is the measured step less these savings. It is an estimate: compiled code fuses what is timed apart here, and a
block's adapters count as saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor

from sparse_compile.calibration.taps import TappedModel
from sparse_compile.calibration.timing import Untimed, block_seconds, map_seconds, step_seconds
from sparse_compile.compiler.explain import explain
from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.options.recipe import AffineMap

__all__ = ["Sample", "StepCost", "cost_in_flops", "cost_in_seconds", "samples_of"]

_ALLOWED_SECONDS: Final = 4.0
"""What timing blocks and maps may take, beside one run and one warm-up of each."""

Maps = Mapping[str, Mapping[int, AffineMap]]
"""By site name and rank."""


@dataclass(frozen=True)
class StepCost:
    """What a training step costs.

    Attributes:
        unit: Of `dense`.
        dense: The step of the model as it is: measured seconds, or the FLOPs of its matrix products.
        saved: By site name and rank, the share of `dense` that a map saves; negative where it costs more.
    """

    unit: Literal["seconds", "flops"]
    dense: float
    saved: Mapping[str, Mapping[int, float]]


@dataclass
class Sample:
    """What a block reads in one batch.

    Attributes:
        x: (..., in).
        context: Bool (B, S), true at context tokens.
        uses: How often the block runs in a forward.
    """

    x: Tensor
    context: Tensor
    uses: int = 1


def samples_of(tapped: TappedModel, batch: Mapping[str, Any]) -> dict[str, Sample]:
    """Run a forward; return what each site reads in it, one tensor for all sites of a kind."""
    found: dict[str, Sample] = {}
    kinds: dict[Any, Tensor] = {}

    def probe_of(name: str) -> Any:
        def probe(x: Tensor, context: Tensor) -> None:
            if name in found:
                found[name].uses += 1
            else:
                found[name] = Sample(kinds.setdefault((x.shape, x.dtype, x.device), x), context)

        return probe

    tapped.probe({name: probe_of(name) for name in tapped.taps})
    try:
        tapped(batch)
    finally:
        tapped.probe({})
    return found


def cost_in_seconds(
    tapped: TappedModel, batch: Mapping[str, Any], samples: Mapping[str, Sample], maps: Maps
) -> StepCost:
    """Time the step, the blocks and the maps.

    Args:
        tapped: The model.
        batch: The batch that the samples are of.
        samples: By site name, from `samples_of`.
        maps: The maps that may stand in the place of each site.

    Raises:
        Untimed: Something cannot be timed.
    """
    if untimed := [name for name in maps if name not in tapped.blocks]:
        raise Untimed(f"the weights of {untimed[0]} are not at hand")
    dense = step_seconds(tapped.model, batch)
    keys = {name: _kind(tapped, name, samples[name], maps[name]) for name in maps}
    kinds = {key: name for name, key in reversed(list(keys.items()))}
    items = sum(1 + len(maps[name]) for name in kinds.values())
    seconds = {
        key: _saved_seconds(tapped, name, samples[name], maps[name], _ALLOWED_SECONDS / items)
        for key, name in kinds.items()
    }
    saved = {
        name: {rank: samples[name].uses * each / dense for rank, each in seconds[key].items()}
        for name, key in keys.items()
    }
    return StepCost("seconds", dense, saved)


def _kind(tapped: TappedModel, name: str, sample: Sample, maps: Mapping[int, AffineMap]) -> tuple[Any, ...]:
    """Return what two sites have in common that take equally long."""
    x, context = sample.x, int(sample.context.sum())
    shape = (tuple(x.shape), x.dtype, x.device, context, tapped.taps[name].differentiated)
    return (tapped.blocks[name].signature, shape, tuple(maps))


def _saved_seconds(
    tapped: TappedModel, name: str, sample: Sample, maps: Mapping[int, AffineMap], allowed: float
) -> dict[int, float]:
    """Return by rank how many seconds of a step a map saves at a site.

    A wider map never counts as the faster one: that would be noise.
    """
    block, differentiated = tapped.blocks[name], tapped.taps[name].differentiated
    whole = block_seconds(block, sample.x, differentiated=differentiated, allowed=allowed)
    with torch.no_grad():
        dtype = block(sample.x).dtype
    of_context = whole * float(sample.context.sum()) / sample.context.numel()
    saved: dict[int, float] = {}
    longest = 0.0
    for rank, each in sorted(maps.items()):
        taken = map_seconds(each, sample.x, sample.context, dtype, differentiated=differentiated, allowed=allowed)
        longest = max(longest, taken)
        saved[rank] = of_context - longest
    return saved


def cost_in_flops(
    tapped: TappedModel, batch: Mapping[str, Any], samples: Mapping[str, Sample], ranks: Mapping[str, Sequence[int]]
) -> StepCost:
    """Count the FLOPs of the step's matrix products, and those that maps save; nothing is computed.

    Args:
        tapped: The model.
        batch: The batch that the samples are of.
        samples: By site name, from `samples_of`.
        ranks: By site name, the ranks of the maps that may stand there.

    Raises:
        ValueError: No training step was captured.
    """
    options = SparseLoRAConfig(preset="exact", ignore_index=tapped.config.ignore_index)
    dense = explain(tapped.model, config=options, **batch).flops_before
    if not dense:
        raise ValueError("no training step could be captured: nothing of the model is trained, or nothing is frozen")
    saved = {
        name: {
            rank: samples[name].uses
            * float(samples[name].context.sum())
            * (tapped.taps[name].flops - tapped.taps[name].map_flops(rank))
            / dense
            for rank in sites_ranks
        }
        for name, sites_ranks in ranks.items()
    }
    return StepCost("flops", dense, saved)
