"""Find the parts of a fused layer: query, key and value, or gate and up, in one frozen weight.

    %y       = linear(%x, W, b)            (B, S, C)             the layer
    %heads   = views and transposes of %y                        any number of them, or none
    %a, %b   = chunk(%heads, 2, dim)  or  split, unbind          the parts: each is some rows of W
    %a, %b   = %heads[..., :n], %heads[..., n:]

Nothing is rewritten and no weight is copied: a part is a `Projection` that shares the layer's nodes and says which rows
of the weight are its own (`sites.FusedRows`). Parts may lie side by side (Phi-3, GPT-2), or one after the other within
each head (GPT-NeoX).

No parts are found where: a part of the outputs is not read, or read twice; the outputs are split along tokens, unevenly
along a view, or by anything but slices; the layer carries a DoRA adapter, whose scale is a number for each row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from sparse_compile.graph.declined import Declined
from sparse_compile.graph.read import argument, hinted_shape, op_name, tensor_value, value_of
from sparse_compile.graph.sites import FusedRows, Projection
from sparse_compile.graph.vocabulary import REGROUPINGS, SPLITS
from sparse_compile.passes.read.head_layout import MIXED, Axis, Layout, follow, initial_layout
from sparse_compile.torch_private.fake import size_hint

_STEM = REGROUPINGS | {"transpose", "swapaxes", "swapdims", "permute", "contiguous"}


@dataclass(frozen=True)
class Part:
    """A part of a fused layer.

    Attributes:
        projection: the part; its output is the node that carries it.
        layout: where its channels are in that node.
    """

    projection: Projection
    layout: Layout


@dataclass(frozen=True)
class _Slice:
    """Entries `start` to `stop` of dimension `dim`, which is gone from `node` where `drops` is true."""

    node: fx.Node
    dim: int
    start: int
    stop: int
    drops: bool


def fused_parts(layer: Projection, nodes: dict[str, fx.Node]) -> tuple[Part, ...]:
    """Return the parts that a layer's output is split into, by place; none where it is not split, or not clearly."""
    if layer.dora:
        return ()
    stem = nodes[layer.output]
    layouts = {stem: initial_layout(stem)}
    try:
        while len(stem.users) == 1 and op_name(user := next(iter(stem.users))) in _STEM:
            follow(layouts, [user])
            stem = user
    except Declined:
        return ()
    slices = _slices(stem)
    if slices is None:
        return ()
    parts = [_part(layer, layouts[stem], piece, index) for index, piece in enumerate(slices)]
    return tuple(part for part in parts if part is not None) if all(parts) else ()


def unread_parts(layer: Projection, parts: tuple[Projection, ...]) -> int:
    """Return how many rows of a fused layer belong to none of the given parts."""
    return layer.out_features - sum(part.out_features for part in parts if part.base == layer.base)


def _slices(stem: fx.Node) -> list[_Slice] | None:
    """Return the slices of `stem` in order; None where something else reads it, or a part of it is not read."""
    users = list(stem.users)
    if len(users) == 1 and op_name(users[0]) in SPLITS:
        found = _split_slices(users[0], len(hinted_shape(stem)))
    else:
        found = [_index_slice(user, stem) for user in users]
    slices = sorted((piece for piece in found if piece is not None), key=lambda piece: piece.start)
    if len(slices) < max(2, len(found)) or len({piece.dim for piece in slices}) > 1:
        return None
    borders = [0, *(piece.stop for piece in slices)]
    whole = hinted_shape(stem)[slices[0].dim]
    return slices if borders[-1] == whole and all(p.start == b for p, b in zip(slices, borders, strict=False)) else None


def _split_slices(split: fx.Node, rank: int) -> list[_Slice | None]:
    """Return the parts of a `chunk`, `split` or `unbind`; None for each that is read in another way, or not at all."""
    name = op_name(split)
    dim = int(argument(split, "dim", 0)) % rank
    values = value_of(split)
    sizes = [1 if name == "unbind" else size_hint(value.shape[dim]) for value in values]
    picked = {user.args[1]: user for user in split.users if op_name(user) == "getitem"}
    if len(picked) != len(split.users) or picked.keys() != set(range(len(sizes))):
        return [None]
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [_Slice(picked[i], dim, starts[i], starts[i] + sizes[i], name == "unbind") for i in range(len(sizes))]


def _index_slice(node: fx.Node, stem: fx.Node) -> _Slice | None:
    """Return what `stem[..., a:b, :]` or `stem[..., i, :]` takes, where it takes a part of one dimension."""
    if op_name(node) != "getitem" or tensor_value(node) is None or node.args[0] is not stem:
        return None
    shape = hinted_shape(stem)
    parts: list[Any] = list(node.args[1]) if isinstance(node.args[1], tuple) else [node.args[1]]
    if Ellipsis in parts:
        at = parts.index(Ellipsis)
        parts[at : at + 1] = [slice(None)] * (len(shape) - len(parts) + 1)
    partial = [dim for dim, part in enumerate(parts) if part != slice(None)]
    if len(partial) != 1:
        return None
    part, size = parts[partial[0]], shape[partial[0]]
    if isinstance(part, list | tuple) and len(part) == 1 and isinstance(part[0], int):
        # `stem[..., [i], :]` keeps the dimension.
        return _Slice(node, partial[0], part[0] % size, part[0] % size + 1, drops=False)
    if isinstance(part, int):
        return _Slice(node, partial[0], part % size, part % size + 1, drops=True)
    numbers = isinstance(part, slice) and all(isinstance(x, int | None) for x in (part.start, part.stop, part.step))
    if not numbers or part.step not in (None, 1):
        return None
    start, stop, _ = part.indices(size)
    return _Slice(node, partial[0], start, stop, drops=False)


def _part(layer: Projection, stem: Layout, piece: _Slice, index: int) -> Part | None:
    """Return the part that a slice of the split tensor holds; None where it is not made of whole channels."""
    axes = stem[piece.dim]
    channels = sorted((axis for dim in stem for axis in dim if _is_channel(axis)), key=lambda axis: axis.label)
    if len(axes) != 1 or not _is_channel(axes[0]) or any(axis.label.endswith(MIXED) for axis in channels):
        return None
    place = channels.index(axes[0])
    outer, inner = (math.prod(axis.size for axis in part) for part in (channels[:place], channels[place + 1 :]))
    rows = FusedRows(
        layer=layer,
        offset=piece.start * inner,
        width=(piece.stop - piece.start) * inner,
        blocks=outer,
        stride=axes[0].size * inner,
    )
    taken = () if piece.drops or piece.stop - piece.start == 1 else (Axis(axes[0].label, piece.stop - piece.start),)
    layout = [taken if dim == piece.dim else axes for dim, axes in enumerate(stem)]
    if piece.drops:
        del layout[piece.dim]
    projection = replace(
        layer,
        name=f"{layer.name}[{index}]",
        output=piece.node.name,
        out_features=rows.width * rows.blocks,
        fused=rows,
    )
    return Part(projection, _renamed(layout))


def _is_channel(axis: Axis) -> bool:
    return axis.label.startswith("c")


def _renamed(layout: list[tuple[Axis, ...]]) -> Layout:
    """Name the axes of a part's channels as those of a layer of its own: `c`, or `c.0`, `c.1`, outermost first."""
    labels = sorted(axis.label for dim in layout for axis in dim if _is_channel(axis))
    names = {label: f"c.{place}" if len(labels) > 1 else "c" for place, label in enumerate(labels)}
    return tuple(tuple(Axis(names.get(axis.label, axis.label), axis.size) for axis in dim) for dim in layout)
