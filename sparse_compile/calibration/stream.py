"""Taps on the residual stream: they hand on how it changes behind an exit of context, or have context leave there.

    %h_l = add(...)            ->    %h_l' = tap(%h_l): the stream of the exit and its map, for context tokens
    %x_l = norm(%h_l)                %x_l  = norm(%h_l')

Only what leads to queries, keys and values reads the tap. What the model goes on computing for context tokens behind
the exit is read by nothing that reaches an output token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from sparse_compile.kernels.observed_rows.registry import Observer
from sparse_compile.options.recipe import ExitRecipe
from sparse_compile.passes.read.residual_stream import BlockInput

__all__ = ["Pair", "Stream", "tap_stream"]

Pair = tuple[str, str]
"""Names of the attention block of an exit, and of a later one: a map goes from the one to the other."""


class Stream:
    """What the taps of a model share.

    Attributes:
        exit: Where context leaves, and the maps of the blocks behind; None for nowhere.
        collect: By pair, where rows of context tokens go: what the block of the exit reads, and how much the stream has
            changed when the later block reads it.
    """

    def __init__(self) -> None:
        self.exit: ExitRecipe | None = None
        self.collect: Mapping[Pair, Observer] = {}
        self.streams: dict[str, Tensor] = {}
        self.features: dict[str, Tensor] = {}

    def wants(self, name: str) -> bool:
        """Tell whether a block is one of an exit, in this forward."""
        return any(name == left for left, _ in self.collect) or (self.exit is not None and self.exit.site == name)

    def forget(self) -> None:
        """Drop what blocks of exits have read."""
        self.streams.clear()
        self.features.clear()


class _StreamTap(nn.Module):
    """Stands behind the residual stream, in front of the norm of one attention block.

    Args:
        name: of the block.
        stream: shared.
        dtype: in which a map is computed.
    """

    def __init__(self, name: str, stream: Stream, dtype: torch.dtype) -> None:
        super().__init__()
        self.name = name
        self.stream = stream
        self.dtype = dtype

    def forward(self, h: Tensor, output_mask: Tensor, attended: Tensor | None) -> Tensor:
        """Return the stream as the block reads it.

        Args:
            h: (..., width), over the tokens.
            output_mask: bool (B, S), true at output tokens.
            attended: bool (B, S), false at padding; None where nothing is.
        """
        stream, context = self.stream, ~output_mask
        for (left, later), collect in stream.collect.items():
            if later == self.name:
                scored = (context if attended is None else context & attended).reshape(-1)
                x, before, now = (
                    each.reshape(-1, each.shape[-1])[scored]
                    for each in (stream.features[left], stream.streams[left], h)
                )
                collect(x, now - before)
        if stream.wants(self.name):
            stream.streams[self.name] = h
        if stream.exit is None or self.name not in stream.exit.maps:
            return h
        surrogate = stream.exit.maps[self.name].surrogate
        assert surrogate is not None, "an exit has maps alone"
        # As in training, a map is rounded to the dtype of the weights.
        q, u, bias = (each.to(h.device, self.dtype) for each in (surrogate.q, surrogate.u, surrogate.bias))
        mapped = stream.features[stream.exit.site].to(self.dtype) @ q.mT @ u.mT + bias
        seen = (stream.streams[stream.exit.site] + mapped).to(h.dtype)
        return torch.where(context.reshape(*h.shape[:-1], 1), seen, h)


class _FeaturesTap(nn.Module):
    """Stands behind the norm of one attention block."""

    def __init__(self, name: str, stream: Stream) -> None:
        super().__init__()
        self.name = name
        self.stream = stream

    def forward(self, x: Tensor) -> None:
        """Remember x, (..., width), where the block is one of an exit."""
        if self.stream.wants(self.name):
            self.stream.features[self.name] = x


def tap_stream(
    gm: fx.GraphModule,
    blocks: Sequence[BlockInput],
    stream: Stream,
    dtypes: Mapping[str, torch.dtype],
    roles: tuple[fx.Node, fx.Node | None],
) -> None:
    """Put taps in front of attention blocks and behind their norms.

    Args:
        gm: The graph; whoever calls recompiles it.
        blocks: What the blocks read.
        stream: Shared by all taps of a model.
        dtypes: By name of a block, in which its map is computed.
        roles: The nodes that hold the output mask, and what tells padding or None.
    """
    for number, block in enumerate(blocks):
        before, behind = f"sparselora_stream_{number}", f"sparselora_features_{number}"
        gm.add_submodule(before, _StreamTap(block.site.name, stream, dtypes[block.site.name]))
        gm.add_submodule(behind, _FeaturesTap(block.site.name, stream))
        with gm.graph.inserting_after(block.source):
            gm.graph.call_module(behind, (block.source,))
        with gm.graph.inserting_after(block.stream):
            tapped = gm.graph.call_module(before, (block.stream, *roles))
        for reader in block.readers:
            reader.replace_input_with(block.stream, tapped)
