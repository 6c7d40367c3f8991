"""Tell whether an attention mask forbids every key that comes after its query: how it is computed shows it.

    %keys    = arange(S)[None, None, None, :]         the value is the position along the last dimension
    %queries = arange(S)[None, None, :, None]         the value is the position along the last but one
    %causal  = le(%keys, %queries)                    true at most where key <= query
    %mask    = and(%causal, %padding[:, None, None])  the same: a mask may forbid more than that

`tril(...)` is such a mask as well. A mask that is not recognised counts as not causal. Positions that are inputs of the
graph (packed sequences) need not rise, so nothing is shown of them. Sizes are compared as expressions, so the answer
holds for every batch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import fx

from sparse_compile.graph.read import argument, calls_torch, op_name, tensor_of, tensor_value
from sparse_compile.graph.vocabulary import CASTS, CONJUNCTIONS, COPIES, NOT_AFTER, NOT_BEFORE
from sparse_compile.torch_private.fake import size_expression

_SAME = CASTS | COPIES | {"expand"}
_EXACT_INTEGERS = {torch.int32, torch.int64}


class CausalMasks:
    """Answers for the masks of one graph.

    Args:
        written: nodes that may be written to in place; nothing is known of what they hold.
    """

    def __init__(self, written: Collection[fx.Node]) -> None:
        self.written = written

    def forbids_later_keys(self, mask: fx.Node) -> bool:
        """Tell whether a mask (..., queries, keys) is false or zero wherever the key comes after the query."""
        value = tensor_value(mask)
        if value is None or value.dim() < 2 or not calls_torch(mask) or mask in self.written:
            return False
        name, operands = op_name(mask), [arg for arg in mask.args if isinstance(arg, fx.Node)]
        if name in CONJUNCTIONS:
            return any(self._forbids_at(operand, mask) for operand in operands)
        if name in NOT_AFTER | NOT_BEFORE and len(operands) == 2:
            keys, queries = operands if name in NOT_AFTER else reversed(operands)
            along = self.position_along(keys), self.position_along(queries)
            return along == (-1, -2) and _size(keys, -1) == _size(mask, -1) and _size(queries, -2) == _size(mask, -2)
        if name == "tril":
            diagonal = argument(mask, "diagonal", 0)
            return isinstance(diagonal, int) and diagonal <= 0
        source = argument(mask, "input")
        if not isinstance(source, fx.Node):
            return False
        is_same = name in _SAME or (name == "getitem" and _keeps_last_two(mask.args[1], source))
        if name == "unsqueeze":
            is_same = _new_dimension(mask) < value.dim() - 2
        return is_same and self._forbids_at(source, mask)

    def _forbids_at(self, operand: fx.Node, mask: fx.Node) -> bool:
        """Tell the same of an operand whose queries and keys are those of `mask`, not broadcast to them."""
        if not self.forbids_later_keys(operand):
            return False
        return all(_size(operand, dim) == _size(mask, dim) for dim in (-2, -1))

    def position_along(self, node: fx.Node) -> int | None:
        """Return the dimension, from the end, along which each value of an integer tensor is its own position."""
        value = tensor_value(node)
        if value is None or value.dtype not in _EXACT_INTEGERS or not calls_torch(node) or node in self.written:
            return None
        name = op_name(node)
        if name == "arange":
            return -1 if _counts_from_zero(node) else None
        source = argument(node, "input")
        if not isinstance(source, fx.Node):
            return None
        if name in _SAME or (name in ("add", "sub", "__add__", "__sub__") and node.args[1:] == (0,)):
            along = self.position_along(source)
            return along if along is not None and _size(source, along) == _size(node, along) else None
        if name == "unsqueeze":
            return _shifted(self.position_along(source), [_new_dimension(node) - value.dim()])
        return self._indexed(source, node.args[1], node) if name == "getitem" else None

    def _indexed(self, source: fx.Node, index: Any, node: fx.Node) -> int | None:
        """Follow positions through `source[index]`: dimensions that are added, or a look-up in a table of positions."""
        items = index if isinstance(index, tuple | list) else (index,)
        table, along = tensor_value(source), self.position_along(source)
        if table is None or along is None:
            return None
        if all(item is None or item is Ellipsis or item == slice(None) for item in items):
            items = _for_each_dimension(items, table.dim())
            return _shifted(along, [place - len(items) for place, item in enumerate(items) if item is None])
        # table[i, j] of a table whose value is its position along j is j, broadcast against i.
        if len(items) != table.dim() or not all(isinstance(item, fx.Node) for item in items):
            return None
        found = self.position_along(items[along])
        return found if found is not None and _size(items[along], found) == _size(node, found) else None


def _size(node: fx.Node, dim: int) -> Any:
    value = tensor_value(node)
    return size_expression(value.shape[dim]) if value is not None and value.dim() >= -dim else None


def _counts_from_zero(node: fx.Node) -> bool:
    if node.kwargs.keys() & {"start", "end", "step"}:
        return False
    return len(node.args) == 1 or node.args[:-1] == (0,)


def _new_dimension(node: fx.Node) -> int:
    return int(argument(node, "dim")) % tensor_of(node).dim()


def _shifted(position: int | None, added: list[int]) -> int | None:
    """Return where a dimension is after dimensions of size 1 were added, all counted from the end of the result."""
    if position is None:
        return None
    for dim in sorted(added, reverse=True):
        position -= dim >= position
    return position


def _for_each_dimension(items: Sequence[Any], rank: int) -> tuple[Any, ...]:
    """Spell out the dimensions that an index leaves to an ellipsis, or to its end."""
    left = [slice(None)] * (rank - sum(item is not None and item is not Ellipsis for item in items))
    where = items.index(Ellipsis) if Ellipsis in items else len(items)
    return (*items[:where], *left, *items[where + 1 :])


def _keeps_last_two(index: Any, source: fx.Node) -> bool:
    """Tell whether an index leaves the last two dimensions as they are, however many others it adds or takes from."""
    items = index if isinstance(index, tuple | list) else (index,)
    value = tensor_value(source)
    if value is None or any(isinstance(item, fx.Node) for item in items):
        return False
    return all(item == slice(None) for item in _for_each_dimension(items, value.dim())[-2:])
