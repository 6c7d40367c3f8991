"""Find the blocks before which context tokens may leave the residual stream, and what is computed for them behind.

An exit is found as in training, by `sites_behind_exit`; of a model that context cannot leave the reason is handed on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import fx

from sparse_compile.calibration.blocks import Block, cut_block, gets_gradient
from sparse_compile.graph.cost import projection_flops
from sparse_compile.graph.declined import Declined
from sparse_compile.graph.read import nodes_by_name
from sparse_compile.graph.sites import AttentionSite
from sparse_compile.passes.context import PassContext
from sparse_compile.passes.read.autocast import autocast_dtypes
from sparse_compile.passes.read.exit_sites import sites_behind_exit
from sparse_compile.passes.read.residual_stream import BlockInput, block_input
from sparse_compile.passes.roles.plan_sparsity import weights_fingerprint
from sparse_compile.passes.sparse.exit_context import queried_provider

__all__ = ["AttentionPart", "Exit", "Exits", "find_exits"]

_MOST_EXITS: Final = 8
"""Exits that are tried of a deep model, evenly spaced from the last block on: each takes maps and measurements."""


@dataclass(frozen=True, eq=False)
class AttentionPart:
    """What an attention block computes for each query.

    Attributes:
        width: Of the residual stream.
        dtype: Of its weights, in which a map is computed.
        differentiated: Whether what it reads gets a gradient in training.
        flops: Of its frozen query and output products for one token in a training step, as far as rows are left out.
        heads, head_dim, value_head_dim: Sizes of its attention.
        narrows: Whether attention is computed for some queries alone where the others have left.
        query, output: The layers alone; None where rows of a layer are not left out, or it is not at hand.
    """

    width: int
    dtype: torch.dtype
    differentiated: bool
    flops: float
    heads: int
    head_dim: int
    value_head_dim: int
    narrows: bool
    query: Block | None
    output: Block | None


@dataclass(frozen=True, eq=False)
class Exit:
    """A block before which context tokens may leave.

    Attributes:
        site: Name of the attention block.
        later: Names of the attention blocks behind it.
        covered: Names of the feed-forward sites behind it: what stands there is for nobody.
        weights: By name of each later block, what returns the fingerprint of the weights that its map imitates.
    """

    site: str
    later: tuple[str, ...]
    covered: frozenset[str]
    weights: Mapping[str, Callable[[], str]]


@dataclass(frozen=True, eq=False)
class Exits:
    """The exits of one graph.

    Attributes:
        inputs: What each attention block but the first reads.
        exits: By name of their block, the deepest first.
        parts: By name, each attention block but the first.
    """

    inputs: Sequence[BlockInput]
    exits: Mapping[str, Exit]
    parts: Mapping[str, AttentionPart]


def find_exits(gm: fx.GraphModule, ctx: PassContext) -> Exits:
    """Return the exits of a canonical graph, before anything is rewritten.

    Context runs through the first block at least, as by the option `context_exit`.

    Raises:
        Declined: Context cannot leave.
    """
    blocks = ctx.facts.attention_sites
    if ctx.env.config.context_exit == 1:
        raise Declined("graph", "context_exit=1 has it stay to the end")
    if len(blocks) < 2:
        raise Declined("graph", f"the model has {len(blocks)} attention blocks of frozen layers, and it takes 2")
    if len({site.name for site in blocks}) < len(blocks):
        raise Declined(blocks[0].name, "attention blocks share their weights, and a map is for one block")
    nodes = nodes_by_name(gm.graph)
    last, stride = len(blocks) - 1, -(-(len(blocks) - 1) // _MOST_EXITS)
    found = [_exit(gm.graph, ctx, place) for place in range(last, 0, -stride)]
    inputs = [block_input(site, nodes) for site in blocks[1:]]
    devices = {ctx.weight_kind(site.output)[1] for site in blocks[1:]}
    casts = {device: autocast_dtypes(gm.graph, ctx.env.autocast, device) for device in devices}
    parts = {site.name: _part(gm, site, ctx, _narrows(nodes[site.attention], casts)) for site in blocks[1:]}
    return Exits(inputs, {each.site: each for each in found}, parts)


def _exit(graph: fx.Graph, ctx: PassContext, place: int) -> Exit:
    behind = sites_behind_exit(graph, ctx, place)
    later = ctx.facts.attention_sites[place + 1 :]
    weights = {site.name: partial(weights_fingerprint, behind[: behind.index(site)], ctx) for site in later}
    covered = frozenset(site.name for site in behind if site.kind == "ffn")
    return Exit(ctx.facts.attention_sites[place].name, tuple(weights), covered, weights)


def _narrows(attention: fx.Node, casts: Mapping[str, Mapping[str, torch.dtype | None]]) -> bool:
    """Tell whether an attention is computed for some queries alone where the others have left."""
    try:
        queried_provider(attention, casts)
    except Declined:
        return False
    return True


def _part(gm: fx.GraphModule, site: AttentionSite, ctx: PassContext, narrows: bool) -> AttentionPart:
    # The rows of a fused layer's query cannot be left out of its one product.
    layers = [each for each in (site.query, site.output) if each.fused is None]
    differentiated = gets_gradient(gm, site, ctx)
    query, output = (
        cut_block(gm, each.source, each.output, ctx) if each in layers else None for each in (site.query, site.output)
    )
    return AttentionPart(
        width=site.query.in_features,
        dtype=ctx.weight_kind(site.output)[0],
        differentiated=differentiated,
        flops=sum(projection_flops(each) for each in layers) * (1.0 if differentiated else 0.5),
        heads=site.kv_heads * site.groups,
        head_dim=site.head_dim,
        value_head_dim=site.value_head_dim,
        narrows=narrows,
        query=query,
        output=output,
    )
