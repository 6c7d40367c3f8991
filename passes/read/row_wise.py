"""Tell which calls keep rows apart, and which operands such a call reads row by row.

A *row* is one position of a tensor's leading dimensions: in a language model, one token. A call is row-wise where it
computes each row of its result from the same row of its operands, and from nothing else that has rows. Leading sizes
are compared as expressions, so an answer holds for every batch.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx

from sparse_compile.graph.declined import Declined
from sparse_compile.graph.read import argument, calls_torch, op_name, set_argument, tensor_of, tensor_value
from sparse_compile.graph.vocabulary import CASTS, COPIES, LINEAR, MATMULS, NORMALISATIONS, REDUCTIONS, SPLITS, VIEWS
from sparse_compile.passes.read.elementwise import is_elementwise
from sparse_compile.torch_private.fake import size_expression

Sizes = tuple[sympy.Expr, ...]
Slice = tuple[Any, Any, Any]
"""Start, stop and step: numbers, nodes that hold numbers, or None."""

SAME_ROWS = CASTS | COPIES | {"dropout"}
_CUTS = SPLITS - {"unbind"}
_ALONG_SOME = REDUCTIONS | _CUTS | {"softmax", "log_softmax"}
"""Calls that keep rows apart where they work along none of the leading dimensions."""
_WRITES = {operator.iadd, operator.isub, operator.imul, operator.itruediv}


@dataclass(frozen=True)
class RowOperand:
    """An operand that has the rows of the result.

    Attributes:
        node: the operand.
        lead: its leading sizes, whose product is the number of rows.
        slices: where the result has some of the operand's rows only, the slice of each leading dimension.
    """

    node: fx.Node
    lead: Sizes
    slices: tuple[Slice, ...] | None = None


def sizes_of(node: fx.Node) -> Sizes:
    """Return the sizes of a tensor node as expressions."""
    value = tensor_of(node)
    return tuple(size_expression(size) for size in value.shape)


def row_operands(node: fx.Node, lead: Sizes) -> list[RowOperand]:
    """Return the operands that the rows of `node` are computed from.

    Operands that have no rows (weights, numbers) are not among them.

    Args:
        node: a call.
        lead: the leading sizes of its result that count rows.

    Raises:
        Declined: a row may depend on other rows, or that cannot be told.
    """
    name = op_name(node)
    if not calls_torch(node) and not _picks_part(node):
        raise Declined(node, f"{name or node.op} is not known to keep tokens apart")
    if _writes(node):
        raise Declined(node, f"{name} writes into its operand")
    if _is_product(node) or name in SAME_ROWS or name in NORMALISATIONS or name in _ALONG_SOME:
        return [_first(node, lead)]
    if name in VIEWS:
        return [_viewed(node, lead)]
    if name == "getitem":
        return [_picked(node, lead)]
    if is_elementwise(node):
        return list(_elementwise(node, lead))
    raise Declined(node, f"{name} is not known to keep tokens apart")


def _writes(node: fx.Node) -> bool:
    name = op_name(node)
    if node.target in _WRITES or (name.endswith("_") and not name.endswith("__")):
        return True
    # `inplace` comes last: after `training` of dropout, and is the only flag of an activation function.
    flags = [arg for arg in node.args[1:] if isinstance(arg, bool)]
    in_position = flags[1:] == [True] if name == "dropout" else is_elementwise(node) and flags == [True]
    return bool(node.kwargs.get("inplace")) or in_position


def _is_product(node: fx.Node) -> bool:
    if node.target is LINEAR:
        return True
    if op_name(node) not in MATMULS:
        return False
    other = tensor_value(argument(node, "other"))
    return other is not None and other.dim() == 2


def _picks_part(node: fx.Node) -> bool:
    """Tell whether `node` takes an element of what `chunk` or `split` returned."""
    return op_name(node) == "getitem" and op_name(node.args[0]) in _CUTS  # type: ignore[arg-type]


def _first(node: fx.Node, lead: Sizes) -> RowOperand:
    """Return the first operand, which has the same leading sizes, where the call works within rows."""
    operand = argument(node, "input")
    if not isinstance(operand, fx.Node) or tensor_value(operand) is None or sizes_of(operand)[: len(lead)] != lead:
        raise Declined(node, f"{op_name(node)} changes what tokens its result has")
    rank = len(sizes_of(operand))
    if op_name(node) in _ALONG_SOME and min(_dims(node, rank), default=-1) < len(lead):
        raise Declined(node, f"{op_name(node)} works across tokens")
    if op_name(node) in NORMALISATIONS and len(argument(node, "normalized_shape")) > rank - len(lead):
        raise Declined(node, f"{op_name(node)} works across tokens")
    return RowOperand(operand, lead)


def _dims(node: fx.Node, rank: int) -> list[int]:
    """Return the dimensions that a reduction, softmax or split works along, none of them negative."""
    name = op_name(node)
    given = argument(node, "dim", 0 if name in _CUTS else None)
    dims = given if isinstance(given, Sequence) else (given,)
    if not dims or not all(isinstance(dim, int) for dim in dims):
        raise Declined(node, f"{name} works along all dimensions, tokens included")
    return [dim % rank for dim in dims]


def with_negative_dims(node: fx.Node, rank: int) -> None:
    """Write the dimensions of a reduction, softmax or split counted from the end: the leading ones are about to go."""
    given = argument(node, "dim")
    if given is None or op_name(node) not in _ALONG_SOME:
        return
    negative: Any = [d % rank - rank for d in given] if isinstance(given, Sequence) else given % rank - rank
    set_argument(node, "dim", negative)


def _viewed(node: fx.Node, lead: Sizes) -> RowOperand:
    """Follow a view: it keeps rows apart where the leading sizes of both sides have the same product."""
    operand = argument(node, "input")
    if not isinstance(operand, fx.Node) or tensor_value(operand) is None:
        raise Declined(node, f"{op_name(node)} of no tensor")
    sizes, rows = sizes_of(operand), sympy.expand(sympy.prod(lead))
    inner = sympy.expand(sympy.prod(sizes_of(node)[len(lead) :]))
    for border in range(len(sizes) + 1):
        outer_size, inner_size = (sympy.expand(sympy.prod(part)) for part in (sizes[:border], sizes[border:]))
        if outer_size == rows and inner_size == inner:
            return RowOperand(operand, sizes[:border])
    raise Declined(node, f"{op_name(node)} puts values of several tokens into one row")


def _picked(node: fx.Node, lead: Sizes) -> RowOperand:
    operand, index = node.args
    if not isinstance(operand, fx.Node):
        raise Declined(node, "getitem of what is no tensor of the graph")
    if _picks_part(node):
        return RowOperand(operand, lead)
    if tensor_value(operand) is None:
        raise Declined(node, f"{op_name(operand)} is not known to keep tokens apart")
    sizes = sizes_of(operand)
    parts: list[Any] = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in parts:
        at = parts.index(Ellipsis)
        parts[at : at + 1] = [slice(None)] * (len(sizes) - len(parts) + 1)
    parts += [slice(None)] * (len(sizes) - len(parts))
    if len(parts) != len(sizes) or not all(isinstance(part, slice) for part in parts):
        raise Declined(node, "getitem picks tokens otherwise than by slices")
    border = len(lead)
    if sizes_of(node)[border:] != sizes[border:]:
        raise Declined(node, "getitem picks channels as well")
    slices = tuple((part.start, part.stop, part.step) for part in parts[:border])
    takes_all = all(start in (None, 0) and stop is None and step in (None, 1) for start, stop, step in slices)
    return RowOperand(operand, sizes[:border], None if takes_all else slices)


def _elementwise(node: fx.Node, lead: Sizes) -> Iterator[RowOperand]:
    rank = len(sizes_of(node))
    for operand in node.all_input_nodes:
        if tensor_value(operand) is None:
            continue
        sizes = sizes_of(operand)
        missing = rank - len(sizes)
        outer = sizes[: max(len(lead) - missing, 0)]
        if not outer or (all(size == 1 for size in outer) and (sympy.Integer(1),) * missing + outer != lead):
            continue  # broadcast over all rows
        if (sympy.Integer(1),) * missing + outer != lead:
            raise Declined(node, f"{op_name(node)} reads one value for several tokens, another for others")
        yield RowOperand(operand, outer)
