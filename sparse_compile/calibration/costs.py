"""What a training step costs, and what maps would save of it: in seconds of this machine, or in FLOPs.

Each distinct block is timed once, and each map in its place, with the tokens of a real batch. What is expected of a
recipe is the measured step less these savings. It is an estimate: compiled code fuses what is timed apart here, and a
block's adapters count as saved.

An exit of context saves, behind its block, the feed-forward blocks of context tokens, their queries, their scores where
attention is computed for the others alone, and their output projections. Its maps, and the rows that they are put into,
are taken off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor

from sparse_compile.calibration.exits import AttentionPart
from sparse_compile.calibration.taps import TappedModel
from sparse_compile.calibration.timing import Untimed, attention_seconds, block_seconds, map_seconds, step_seconds
from sparse_compile.compiler.explain import explain
from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.options.recipe import AffineMap

__all__ = ["Sample", "StepCost", "cost_in_flops", "cost_in_seconds", "samples_of"]

_ALLOWED_SECONDS: Final = 4.0
"""What timing blocks and maps may take, beside one run and one warm-up of each."""

Maps = Mapping[str, Mapping[int, AffineMap]]
"""By site name and rank."""

Shares = dict[str, dict[int, float]]
"""By name of a site, or of the block before which context leaves, and by rank of the maps."""


@dataclass(frozen=True)
class StepCost:
    """What a training step costs.

    Attributes:
        unit: Of `dense`.
        dense: The step of the model as it is: measured seconds, or the FLOPs of its matrix products.
        saved: By site name and rank, the share of `dense` that a map saves; negative where it costs more.
        exits: The same of an exit, by name of the block before which context leaves, and by rank of all its maps.
    """

    unit: Literal["seconds", "flops"]
    dense: float
    saved: Mapping[str, Mapping[int, float]]
    exits: Mapping[str, Mapping[int, float]]


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
    tapped: TappedModel, batch: Mapping[str, Any], samples: Mapping[str, Sample], maps: Maps, ranks: Sequence[int]
) -> StepCost:
    """Time the step, the blocks, the maps, and what context tokens cost in attention blocks.

    Args:
        tapped: The model.
        batch: The batch that the samples are of.
        samples: By site name, from `samples_of`.
        maps: The maps that may stand in the place of each site.
        ranks: The ranks of maps behind an exit.

    Raises:
        Untimed: Something cannot be timed.
    """
    if untimed := [name for name in maps if name not in tapped.blocks]:
        raise Untimed(f"the weights of {untimed[0]} are not at hand")
    dense = step_seconds(tapped.model, batch)
    keys = {name: _kind(tapped, name, samples[name], maps[name]) for name in maps}
    kinds = {key: name for name, key in reversed(list(keys.items()))}
    items = sum(1 + len(maps[name]) for name in kinds.values())
    whole: dict[Any, float] = {}
    seconds: dict[Any, dict[int, float]] = {}
    for key, name in kinds.items():
        allowed = _ALLOWED_SECONDS / items
        whole[key], seconds[key] = _saved_seconds(tapped, name, samples[name], maps[name], allowed)
    saved = {
        name: {rank: samples[name].uses * each / dense for rank, each in seconds[key].items()}
        for name, key in keys.items()
    }
    of_sites = {name: samples[name].uses * whole[key] / dense for name, key in keys.items()}
    of_blocks, of_maps = _attention_shares(tapped, samples, ranks, dense)
    return StepCost("seconds", dense, saved, _exit_shares(tapped, of_sites, of_blocks, of_maps))


def _exit_shares(
    tapped: TappedModel,
    of_sites: Mapping[str, float],
    of_blocks: Mapping[str, float],
    of_maps: Mapping[str, Mapping[int, float]],
) -> Shares:
    """Return the share of a step that each exit saves, by rank of its maps.

    Args:
        tapped: The model.
        of_sites: By feed-forward site, the share of a step that it takes for context tokens.
        of_blocks: By attention block, the share that goes when context tokens ask nothing.
        of_maps: By attention block and rank, the share that a map to it takes.
    """
    return {
        each.site: {
            rank: sum(of_sites.get(name, 0.0) for name in each.covered)
            + sum(of_blocks[name] for name in (each.site, *each.later))
            - sum(of_maps[name][rank] for name in each.later)
            for rank in next(iter(of_maps.values()))
        }
        for each in tapped.exits.values()
    }


def _attention_shares(
    tapped: TappedModel, samples: Mapping[str, Sample], ranks: Sequence[int], dense: float
) -> tuple[dict[str, float], Shares]:
    """Return by attention block the share of a step that its queries take for context, and those of maps by rank."""
    first = next(iter(samples.values()), None)
    if first is None or not tapped.exits:
        return {}, {}
    known: dict[Any, tuple[float, dict[int, float]]] = {}
    found = {}
    for name, part in tapped.attention.items():
        blocks = (part.query, part.output)
        kind = (
            tuple(None if each is None else each.signature for each in blocks), part.heads, part.head_dim, part.width,
            part.narrows, part.differentiated,
        )  # fmt: skip
        if kind not in known:
            known[kind] = _attention_seconds(part, first, ranks)
        asked, mapped = known[kind]
        found[name] = asked / dense, {rank: each / dense for rank, each in mapped.items()}
    return {name: asked for name, (asked, _) in found.items()}, {name: mapped for name, (_, mapped) in found.items()}


def _attention_seconds(part: AttentionPart, sample: Sample, ranks: Sequence[int]) -> tuple[float, dict[int, float]]:
    """Return what an attention block takes for queries of context tokens, and what a map to it takes by rank."""
    context, like, differentiated = sample.context, sample.x, part.differentiated
    allowed = _ALLOWED_SECONDS / (3 + len(ranks))
    asked = 0.0
    for layer, width in ((part.query, part.width), (part.output, part.heads * part.value_head_dim)):
        if layer is not None:
            x = like.new_empty(*like.shape[:-1], width).normal_()
            asked += block_seconds(layer, x, differentiated=differentiated, allowed=allowed)
    if part.narrows:
        asked += attention_seconds(part, like, context, allowed=allowed)
    x, taken, longest = like.new_empty(*like.shape[:-1], part.width).normal_(), {}, 0.0
    for rank in sorted(ranks):
        parts = ((rank, part.width), (part.width, rank), (part.width,))
        noise = AffineMap(*(torch.randn(shape, device=like.device) for shape in parts))
        longest = max(
            longest, map_seconds(noise, x, context, part.dtype, differentiated=differentiated, allowed=allowed)
        )
        taken[rank] = longest
    return asked * float(context.sum()) / context.numel(), taken


def _kind(tapped: TappedModel, name: str, sample: Sample, maps: Mapping[int, AffineMap]) -> tuple[Any, ...]:
    """Return what two sites have in common that take equally long."""
    x, context = sample.x, int(sample.context.sum())
    shape = (tuple(x.shape), x.dtype, x.device, context, tapped.taps[name].differentiated)
    return (tapped.blocks[name].signature, shape, tuple(maps))


def _saved_seconds(
    tapped: TappedModel, name: str, sample: Sample, maps: Mapping[int, AffineMap], allowed: float
) -> tuple[float, dict[int, float]]:
    """Return how many seconds of a step a site takes for context tokens, and by rank how many a map saves of them.

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
    return of_context, saved


def cost_in_flops(
    tapped: TappedModel,
    batch: Mapping[str, Any],
    samples: Mapping[str, Sample],
    ranks: Mapping[str, Sequence[int]],
    exit_ranks: Sequence[int],
) -> StepCost:
    """Count the FLOPs of the step's matrix products, and those that maps save; nothing is computed.

    Args:
        tapped: The model.
        batch: The batch that the samples are of.
        samples: By site name, from `samples_of`.
        ranks: By site name, the ranks of the maps that may stand there.
        exit_ranks: The ranks of maps behind an exit.

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
    of_sites = {
        name: each.uses * float(each.context.sum()) * tapped.taps[name].flops / dense for name, each in samples.items()
    }
    of_blocks, of_maps = {}, {}
    for name, part in tapped.attention.items() if samples and tapped.exits else ():
        context = next(iter(samples.values())).context
        tokens = float(context.sum())
        of_blocks[name] = (part.flops * tokens + _score_flops(part, context)) / dense
        of_maps[name] = {
            rank: tokens * 4.0 * rank * part.width * (2 if part.differentiated else 1) / dense for rank in exit_ranks
        }
    return StepCost("flops", dense, saved, _exit_shares(tapped, of_sites, of_blocks, of_maps))


def _score_flops(part: AttentionPart, context: Tensor) -> float:
    """Return the FLOPs that attention for the queries of output tokens alone saves, counted as reports count them."""
    if not part.narrows:
        return 0.0
    sequences, length = context.shape
    # Half of all scores, for a decoder masks the others; of the queries that are left all of them.
    saved = sequences * length / 2 - float((~context).sum())
    of_query = 2.0 * part.heads * length * (part.head_dim + part.value_head_dim)
    return saved * of_query * (3.5 if part.differentiated else 1.0)
