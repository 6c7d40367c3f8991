"""Checks the graph and its facts at the borders between passes.

The rules of `legal.py` are checked after every pass. `SPARSELORA_VERIFY=1` adds a run on stand-ins (shapes
and dtypes without data): what a node is recorded to hold must be what it computes, and a pass that says that it changed
nothing must have changed nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from sparse_compile.compiler.legal import RULES, STAGES, Checked
from sparse_compile.graph.modes import with_switches
from sparse_compile.graph.read import nodes_by_name, op_name, tensor_value, value_of
from sparse_compile.graph.vocabulary import MODE_SWITCHES
from sparse_compile.passes.context import PassContext
from sparse_compile.torch_private.fake import StandIns, is_unbacked, size_expression, size_hint
from sparse_compile.torch_private.fx import flattened


class VerificationError(AssertionError):
    """A pass left an illegal graph: a bug of ours, never the user's."""


def verify(
    gm: fx.GraphModule,
    captured: fx.GraphModule,
    stages: Iterable[str],
    ctx: PassContext,
    *,
    changed: bool = True,
    before: fx.GraphModule | None = None,
) -> None:
    """Check the graph and the facts after a pass.

    Args:
        gm: the graph to check.
        captured: the graph as it was captured.
        stages: the stages reached.
        ctx: the facts.
        changed: whether the pass says that it changed the graph; values are checked only then.
        before: the graph before the pass, whose values were checked: what the pass left alone is not computed again.

    Raises:
        VerificationError: naming the node and the rule.
    """
    reached = frozenset(stages)
    if unknown := reached - set(STAGES):
        raise VerificationError(f"unknown stage {sorted(unknown)}")
    try:
        gm.graph.lint()
    except Exception as error:  # fx raises RuntimeError, AssertionError and KeyError alike
        raise VerificationError(f"the graph is malformed: {error}") from error
    checked = Checked(gm, captured, reached, ctx)
    for rule in RULES:
        if rule.stage in reached:
            for fault in rule.faults(checked):
                raise VerificationError(f"{fault}. The rule of stage {rule.stage!r}: {rule.holds}")
    if os.environ.get("SPARSELORA_VERIFY", "0") in ("", "0"):
        return
    if changed:
        _check_values(checked, set() if before is None else _left_alone(gm, before))
    elif before is not None and before is not gm and not _equal(gm, before):
        raise VerificationError("the pass rewrote the graph and says that it did not")


def _left_alone(gm: fx.GraphModule, before: fx.GraphModule) -> set[fx.Node]:
    """Return the nodes that are what they were, and are computed from such alone."""
    old = nodes_by_name(before.graph)
    return {
        node
        for node in gm.graph.nodes
        if (other := old.get(node.name)) is not None
        and (node.op, node.target, _operands(node)) == (other.op, other.target, _operands(other))
        and all(value_of(each) is value_of(old.get(each.name, each)) for each in (node, *node.all_input_nodes))
        and all(each.name in old for each in node.all_input_nodes)
    }


def _equal(gm: fx.GraphModule, before: fx.GraphModule) -> bool:
    return len(_left_alone(gm, before)) == len(gm.graph.nodes) == len(before.graph.nodes)


def _operands(node: fx.Node) -> Any:
    return map_arg((node.args, node.kwargs), lambda operand: operand.name)


def _check_values(checked: Checked, left_alone: set[fx.Node]) -> None:
    """Compare what nodes are recorded to hold with what they compute of what their operands are recorded to hold.

    Where that agrees for every node, it agrees with a run of the whole graph.
    """
    stand_ins = StandIns(checked.gm)
    if stand_ins.mode is None:
        return
    for node, switches in with_switches(checked.gm.graph):
        computes = node.op not in ("placeholder", "output") and op_name(node) not in MODE_SWITCHES
        if not computes or node in left_alone or not _is_known(node):
            continue
        # Without gradients throughout: a call that writes in place must not make its operand require one.
        with torch.no_grad():
            found = stand_ins.evaluate(node, [each for each in switches if op_name(each) != "_set_grad_enabled"])
        if reason := _difference(value_of(node), found, {}):
            raise VerificationError(f"{node.name} is recorded to hold {reason}")
    narrowed = {output.index for output in checked.facts.loss_rows.outputs} if checked.facts.loss_rows else set()
    leaves = [flattened(each.graph.output_node().args[0])[0] for each in (checked.captured, checked.gm)]
    # Positions of rows come last; outputs that are narrowed differ on purpose.
    for index, (before, after) in enumerate(zip(*leaves, strict=False)):
        _check_output(tensor_value(before), tensor_value(after), narrowed=index in narrowed)


def _is_known(node: fx.Node) -> bool:
    """Tell whether a node and its operands have values: bodies of higher-order ops have none."""
    return all(value_of(each) is not None for each in (node, *node.all_input_nodes))


def _check_output(before: Tensor | None, after: Any, *, narrowed: bool) -> None:
    if narrowed or before is None or not isinstance(after, Tensor):
        return
    shapes = [tuple(size_hint(size) for size in value.shape) for value in (before, after)]
    if shapes[0] != shapes[1] or before.dtype != after.dtype:
        raise VerificationError(f"an output of {before.dtype} {shapes[0]} became {after.dtype} {shapes[1]}")


def _difference(recorded: Any, found: Any, sizes: dict[sympy.Symbol, sympy.Expr]) -> str:
    """Say in what a recorded value differs from a computed one; empty where it does not.

    Args:
        recorded: a tensor, a size, or a sequence of those; anything else is not compared.
        found: what was computed.
        sizes: data-dependent sizes of the computation to those that were recorded, which grows: a call makes its own.
    """
    if isinstance(recorded, tuple | list) and isinstance(found, tuple | list):
        if len(recorded) != len(found):
            return f"{len(recorded)} values, and computes {len(found)}"
        reasons = (_difference(*pair, sizes) for pair in zip(recorded, found, strict=True))
        return next((reason for reason in reasons if reason), "")
    if isinstance(recorded, int | torch.SymInt) and isinstance(found, int | torch.SymInt):
        pair = size_expression(recorded), size_expression(found)
        return "" if _same(*pair, sizes) else f"the size {pair[0]}, and computes {pair[1].xreplace(sizes)}"
    if not isinstance(recorded, Tensor):
        return ""
    if not isinstance(found, Tensor):
        return f"a tensor, and computes {type(found).__name__}"
    for name in ("dtype", "device"):
        if getattr(recorded, name) != getattr(found, name):
            return f"{name} {getattr(recorded, name)}, and computes {getattr(found, name)}"
    known, computed = (tuple(size_expression(size) for size in value.shape) for value in (recorded, found))
    if len(known) != len(computed) or not all(_same(*pair, sizes) for pair in zip(known, computed, strict=True)):
        return f"shape {known}, and computes {tuple(each.xreplace(sizes) for each in computed)}"
    return ""


def _same(known: sympy.Expr, computed: sympy.Expr, sizes: dict[sympy.Symbol, sympy.Expr]) -> bool:
    if is_unbacked(known) and is_unbacked(computed) and computed not in sizes:
        sizes[computed] = known
    return bool(sympy.expand(known - computed.xreplace(sizes)) == 0)
