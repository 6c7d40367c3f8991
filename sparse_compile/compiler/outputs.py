"""Give back, in full size, the outputs of which a graph computed the rows of the loss alone.

This happens around the compiled graph, not in it: inside, AOTAutograd would fill a gradient of full size with zeros for
an output that the loss does not read. Here an output nobody differentiates costs its filling alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from sparse_compile.graph.facts import LossRows
from sparse_compile.graph.read import tensor_value, value_of
from sparse_compile.kernels.token_rows.reference import past_the_end, without_spare_slots
from sparse_compile.torch_private.fake import size_expression, up_to_date

CompiledGraph = Callable[..., Any]
Sizes = Callable[[Sequence[Any]], tuple[int, ...]]


def restored(compiled: CompiledGraph, gm: fx.GraphModule, loss_rows: LossRows) -> CompiledGraph:
    """Wrap a compiled graph so that it returns what the captured graph would have returned.

    Rows that were not computed hold NaN, so that a misuse is loud. A gradient that flows into the others is passed on.

    Args:
        compiled: the rewritten graph, compiled; it returns some outputs narrowed, and positions of rows beside them.
        gm: the captured graph, which tells where sizes come from.
        loss_rows: which outputs are narrowed.
    """
    if not loss_rows.outputs:
        return compiled
    count = len(gm.graph.output_node().args[0])  # type: ignore[arg-type]
    leads = [_size_reader(gm, output.lead) for output in loss_rows.outputs]

    def run(*inputs: Any) -> Any:
        results = list(compiled(*inputs))
        for output, lead in zip(loss_rows.outputs, leads, strict=True):
            selected, rows = results[output.index], results[output.rows]
            placed = _PlaceRows.apply(selected, rows, lead(inputs), loss_rows.spare)  # type: ignore[no-untyped-call]
            results[output.index] = placed
        return tuple(results[:count])

    return run


def _size_reader(gm: fx.GraphModule, sizes: tuple[sympy.Expr, ...]) -> Sizes:
    """Return a function of the graph's inputs that gives sizes which are expressions over its symbols."""
    places: dict[sympy.Symbol, tuple[int, int | None]] = {}
    symbolic: torch.SymInt | None = None
    for index, node in enumerate(node for node in gm.graph.nodes if node.op == "placeholder"):
        value, tensor = value_of(node), tensor_value(node)
        found = {None: value} if tensor is None else dict(enumerate(tensor.shape))
        for dim, size in found.items():
            if isinstance(size, torch.SymInt):
                symbolic = size
            if isinstance(size, int | torch.SymInt):
                places.setdefault(size_expression(size), (index, dim))
    if symbolic is not None:
        # Sizes were noted when the graph was rewritten, and some may have been found to be equal since.
        sizes = tuple(up_to_date(size, symbolic) for size in sizes)
    wanted = set().union(*(size.free_symbols for size in sizes))
    symbols = [symbol for symbol in places if symbol in wanted]
    assert set(symbols) == wanted, f"no input has the sizes {wanted - set(symbols)}"
    evaluate = sympy.lambdify(symbols, sizes, modules="math")

    def read(inputs: Sequence[Any]) -> tuple[int, ...]:
        found = ((inputs[index], dim) for index, dim in (places[symbol] for symbol in symbols))
        return tuple(map(int, evaluate(*(value if dim is None else value.shape[dim] for value, dim in found))))

    return read


class _PlaceRows(torch.autograd.Function):
    """Puts rows (R, ...) in their places in a tensor of NaN; where slots may be spare (-1), those have no place."""

    @staticmethod
    def forward(ctx: Any, selected: Tensor, rows: Tensor, lead: tuple[int, ...], spare: bool) -> Tensor:
        # Where nothing reads the result, no gradient comes, and none is to be made up.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rows)
        ctx.leading, ctx.spare = len(lead), spare
        count = math.prod(lead)
        full = selected.new_full((count + spare, *selected.shape[1:]), math.nan)
        full.index_copy_(0, past_the_end(rows, count) if spare else rows, selected)
        return full[:count].view(*lead, *selected.shape[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        (gradient,) = gradients
        if gradient is None:
            return None, None, None, None
        (rows,) = ctx.saved_tensors
        flat = gradient.flatten(0, ctx.leading - 1)
        if not ctx.spare:
            return flat[rows], None, None, None
        return without_spare_slots(flat[rows.clamp_min(0)], rows), None, None, None
