"""Follow where the channels of a tensor go through views, transposes and elementwise ops.

A layout gives, for each dimension of a tensor, the atomic axes it is made of, outermost first. A view that splits a
dimension makes two axes of one (`c` becomes `c.0`, `c.1`); a view that merges dimensions joins their axes. Followed
from a projection's output to the attention, it says which head and which channel each output feature is, for any
spelling:

    (B, S, C)  --view(B, S, H, D)-->  (B)(S)(c.0)(c.1)  --transpose(1, 2)-->  (B)(c.0)(S)(c.1)

Sizes are those seen at tracing (hints): a view's meaning does not depend on the value of a symbolic size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from sparse_compile.graph.declined import Declined
from sparse_compile.graph.read import argument, calls_torch, hinted_shape, op_name, tensor_value, value_of
from sparse_compile.graph.vocabulary import NORMALISATIONS, REDUCTIONS, REGROUPINGS, SPLITS
from sparse_compile.passes.read.elementwise import is_elementwise
from sparse_compile.torch_private.fake import size_hint

MIXED = "~"
"""Suffix of an axis whose entries were mixed among themselves (rotary embedding, a norm over the head)."""
_EXPANSIONS = ("expand", "expand_as", "broadcast_to")
GROUP = "g"
"""Label of the axis by which key/value heads are repeated."""


@dataclass(frozen=True)
class Axis:
    """An atomic axis: a label that tells its origin, and its size."""

    label: str
    size: int


Layout = tuple[tuple[Axis, ...], ...]


def origin(axis: Axis) -> str:
    """Return the label of an axis whether or not its entries were mixed."""
    return axis.label.replace(MIXED, "")


def initial_layout(node: fx.Node, last: str = "c") -> Layout:
    """Return the layout of a tensor whose dimensions are all atomic: `t0`, `t1`, ..., and `last`."""
    shape = hinted_shape(node)
    labels = [f"t{i}" for i in range(len(shape) - 1)] + [last]
    return tuple(_axes(Axis(label, size)) for label, size in zip(labels, shape, strict=True))


def follow(layouts: dict[fx.Node, Layout], nodes: Iterable[fx.Node]) -> None:
    """Extend `layouts` to the given nodes, which come in graph order and read nodes that have a layout.

    Raises:
        Declined: a node does something to the channels that a layout cannot express; the first one is named.
    """
    for node in nodes:
        layouts[node] = _layout(node, layouts)


def _lost(node: fx.Node, what: str) -> Declined:
    """Return what is raised where a layout ends. The reason names the node, for an attention is reported as a whole."""
    return Declined(node, f"{node.name}: {what}")


def _axes(*axes: Axis) -> tuple[Axis, ...]:
    return tuple(axis for axis in axes if axis.size != 1)


def _layout(node: fx.Node, layouts: dict[fx.Node, Layout]) -> Layout:
    if node.target is getattr and node.args[1] == "mT":
        *outer, rows, columns = layouts[node.args[0]]  # type: ignore[index]
        return (*outer, columns, rows)
    if not calls_torch(node):
        raise _lost(node, "not a tensor operation")
    name = op_name(node)
    operands = [operand for operand in node.all_input_nodes if operand in layouts]
    before = layouts[operands[0]]
    if name in SPLITS - {"unbind"}:
        return _split(node, before)
    if tensor_value(node) is None:
        raise _lost(node, "returns no tensor")
    shape = hinted_shape(node)
    if name in ("cat", "concat", "stack"):
        return _joined(node, layouts)
    if name in REGROUPINGS - {"unsqueeze"}:
        return _regroup(node, before, shape)
    if name in ("transpose", "swapaxes", "swapdims", "permute", "t"):
        return _permuted(node, before)
    if name in ("unsqueeze", *_EXPANSIONS, "repeat_interleave", "repeat"):
        return _repeated(node, before, shape)
    if name == "getitem":
        # The parts of a split carry the layout that the split was given.
        return before if tensor_value(operands[0]) is None else _indexed(node, before, shape)
    if name in ("view_as_complex", "view_as_real"):
        return _complex(node, before, shape)
    if is_elementwise(node):
        return _combined(node, [layouts[operand] for operand in operands], shape)
    if name in REDUCTIONS and shape[:-1] == hinted_shape(operands[0])[:-1]:
        return (*before[:-1], _mixed(before[-1], shape[-1]))
    if name in NORMALISATIONS and len(argument(node, "normalized_shape")) == 1:
        return (*before[:-1], _mixed(before[-1], shape[-1]))
    raise _lost(node, f"`{name}` may mix heads or channels")


def _split(node: fx.Node, before: Layout) -> Layout:
    """Handle a split of the last dimension into equal parts (rotary embedding); the parts share one layout."""
    parts = value_of(node)
    sizes = {size_hint(part.shape[-1]) for part in parts}
    dim = int(argument(node, "dim", 0)) % len(before)
    if any(origin(axis) == "c.0" for axis in before[dim]):
        raise _lost(node, "splits the heads, as differential attention pairs them: it stays dense")
    if dim != len(before) - 1 or len(sizes) != 1:
        raise _lost(node, "splits tokens, or a head unevenly")
    return (*before[:-1], _mixed(before[-1], sizes.pop()))


def _regroup(node: fx.Node, before: Layout, shape: tuple[int, ...]) -> Layout:
    """Split and merge axes in row-major order so that the dimensions have the sizes of `shape`."""
    pending = [axis for dim in before for axis in dim][::-1]
    after: list[tuple[Axis, ...]] = []
    for size in shape:
        dim: list[Axis] = []
        filled = 1
        while filled < size:
            if not pending:
                raise _lost(node, "the view does not fit the layout")
            axis = pending.pop()
            missing = size // filled
            if axis.size <= missing and missing % axis.size == 0:
                dim.append(axis)
                filled *= axis.size
            elif axis.size % missing == 0 and size % filled == 0:
                dim.append(Axis(f"{axis.label}.0", missing))
                pending.append(Axis(f"{axis.label}.1", axis.size // missing))
                filled = size
            else:
                raise _lost(node, "the view splits a dimension unevenly")
        after.append(_joined_parts(dim))
    if pending:
        raise _lost(node, "the view does not fit the layout")
    return tuple(after)


def _joined_parts(dim: list[Axis]) -> tuple[Axis, ...]:
    """Make one axis again of the parts of a head's channels that a rotary embedding stacked and flattens."""
    if len(dim) > 1 and all(axis.label.endswith(MIXED) for axis in dim):
        return (Axis(dim[0].label, math.prod(axis.size for axis in dim)),)
    return tuple(dim)


def _complex(node: fx.Node, before: Layout, shape: tuple[int, ...]) -> Layout:
    """Handle pairs of a head's channels that are taken as complex numbers (rotary embedding), and back."""
    if op_name(node) == "view_as_real":
        return (*before, (Axis(f"c{MIXED}", shape[-1]),))
    # The dimension of two, real and imaginary, is gone: a pair must be two channels of one head.
    if any(not origin(axis).startswith("c") or origin(axis) == "c.0" for axis in (*before[-2], *before[-1])):
        raise _lost(node, "makes complex numbers of more than the channels of a head")
    return (*before[:-2], _mixed(before[-2], shape[-1]))


def _permuted(node: fx.Node, before: Layout) -> Layout:
    rank = len(before)
    dims = list(range(rank))
    if op_name(node) == "permute":
        order = argument(node, "dims")
        order = order if isinstance(order, tuple | list) else node.args[1:]
        dims = [int(dim) % rank for dim in order]  # type: ignore[arg-type]
    elif op_name(node) == "t":
        dims.reverse()
    else:
        a, b = (int(argument(node, dim)) % rank for dim in ("dim0", "dim1"))
        dims[a], dims[b] = dims[b], dims[a]
    return tuple(before[dim] for dim in dims)


def _repeated(node: fx.Node, before: Layout, shape: tuple[int, ...]) -> Layout:
    """Handle ops that add dimensions of size 1, or repeat along one dimension."""
    name = op_name(node)
    if name == "unsqueeze":
        position = int(argument(node, "dim")) % len(shape)
        return (*before[:position], (), *before[position:])
    padded: Layout = ((),) * (len(shape) - len(before)) + before
    after: list[tuple[Axis, ...]] = []
    for dim, size in zip(padded, shape, strict=True):
        present = math.prod(axis.size for axis in dim)
        if present == size:
            after.append(dim)
        elif size % present:
            raise _lost(node, "repeats unevenly")
        elif name in _EXPANSIONS and present == 1:
            after.append((Axis(GROUP, size),))
        elif name == "repeat_interleave":
            after.append((*dim, Axis(GROUP, size // present)))
        else:
            # `repeat` tiles: the copies are the outer axis.
            after.append((Axis(GROUP, size // present), *dim))
    return tuple(after)


def _indexed(node: fx.Node, before: Layout, shape: tuple[int, ...]) -> Layout:
    """Handle `x[..., None, a:b]`: new dimensions of size 1, and slices, which keep a part of a dimension."""
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    if any(not (part is None or part is Ellipsis or isinstance(part, slice)) for part in index):
        raise _lost(node, "indexes with a number or a tensor")
    given = sum(part is not None and part is not Ellipsis for part in index)
    rest = [slice(None)] * (len(before) - given)
    if Ellipsis in index:
        position = index.index(Ellipsis)
        index = (*index[:position], *rest, *index[position + 1 :])
    else:
        index = (*index, *rest)
    dims = iter(before)
    after: list[tuple[Axis, ...]] = []
    for part, size in zip(index, shape, strict=True):
        dim = () if part is None else next(dims)
        present = math.prod(axis.size for axis in dim)
        if present != size and len(after) != len(shape) - 1:
            raise _lost(node, "takes a part of the tokens or heads")
        after.append(dim if present == size else _mixed(dim, size))
    return tuple(after)


def _joined(node: fx.Node, layouts: dict[fx.Node, Layout]) -> Layout:
    """Handle `cat` and `stack`: with an empty cache, or of parts of one head's channels (rotary embedding)."""
    parts = [part for part in argument(node, "tensors") if not _is_empty(part)]
    shape = hinted_shape(node)
    if any(part not in layouts for part in parts):
        raise _lost(node, "joins the heads with other tensors")
    first = layouts[parts[0]]
    if len(parts) == 1 and op_name(node) != "stack":
        return first
    dim = int(argument(node, "dim", 0)) % len(shape)
    if dim != len(shape) - 1:
        raise _lost(node, "joins tensors along tokens or heads")
    if op_name(node) == "stack":
        return (*first, (Axis(f"c{MIXED}", shape[-1]),))
    return (*first[:-1], _mixed(first[-1], shape[-1]))


def _is_empty(node: object) -> bool:
    return isinstance(node, fx.Node) and tensor_value(node) is not None and math.prod(hinted_shape(node)) == 0


def _combined(node: fx.Node, operands: list[Layout], shape: tuple[int, ...]) -> Layout:
    """Handle elementwise ops: all operands that carry channels must carry them alike."""
    merged: list[tuple[Axis, ...]] = []
    for position in range(-len(shape), 0):
        dims = [layout[position] for layout in operands if -position <= len(layout) and layout[position]]
        if not dims:
            # A broadcast against a tensor from outside would repeat the channels along a new dimension.
            if shape[position] != 1:
                raise _lost(node, "broadcasts the heads against another tensor")
            merged.append(())
            continue
        kinds = {tuple(origin(axis) for axis in dim) for dim in dims}
        if all(len(kind) == 1 and kind[0].startswith("c") and kind[0] != "c.0" for kind in kinds - {("c",)}):
            # A single pair that was rotated: its halves had no axis to tell which channels of the head they are.
            kinds = kinds - {("c",)} or kinds
        if len(kinds) > 1:
            raise _lost(node, "combines tensors whose heads lie differently")
        mixed = [dim for dim in dims if any(axis.label.endswith(MIXED) for axis in dim)]
        merged.append(mixed[0] if mixed else dims[0])
    return tuple(merged)


def _mixed(dim: tuple[Axis, ...], size: int) -> tuple[Axis, ...]:
    """Return the axis of a dimension after a part of it was taken or its entries were mixed."""
    if size == 1:
        return ()
    # The label keeps the head's channel axis recognisable through slicing and joining of its halves.
    label = origin(dim[-1]) if dim else "c"
    return (Axis(label + MIXED, size),)
