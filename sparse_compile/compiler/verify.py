"""The legal graph after each stage, checked at the borders between passes.

Light checks run after every pass. `SPARSELORA_VERIFY=1` adds a run of the whole graph on stand-ins (shapes and dtypes
without data), which must give outputs of the shapes and dtypes that were captured.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import CheckpointPolicy

import sparse_compile.kernels  # noqa: F401  (registers torch.ops.sparselora)
from sparse_compile.graph.facts import LossRows
from sparse_compile.graph.read import calls_torch, op_name, tensor_value
from sparse_compile.graph.vocabulary import MATMULS, TAG
from sparse_compile.torch_private.fake import fake_outputs, size_hint
from sparse_compile.torch_private.fx import flattened

STAGES = (
    "captured", "canonical", "projections", "ffn", "attention", "roles", "plan", "predictors", "sparse", "lowered",
)  # fmt: skip
"""What the graph and its facts have gone through, in the order in which a full run reaches it."""

_OPS = torch.ops.sparselora
_NEVER_AGAIN = {
    _OPS.top_channels.default: "a near tie would choose other channels",
    _OPS.given_output_mask.default: "the roles may have closed by then",
    _OPS.split_tokens.default: "each split is a host synchronisation",
    _OPS.token_slots.default: "the roles may have closed by then",
}
"""Ops whose result is saved for the backward, with what would happen if it were computed again."""


class VerificationError(AssertionError):
    """A pass left an illegal graph: a bug of ours, never the user's."""


def verify(
    gm: fx.GraphModule,
    captured: fx.GraphModule,
    stages: Iterable[str],
    parameters: Iterable[str],
    loss_rows: LossRows | None = None,
) -> None:
    """Check the graph after a pass.

    Args:
        gm: the graph to check.
        captured: the graph as it was captured.
        stages: the stages reached.
        parameters: placeholders that hold parameters.
        loss_rows: the outputs that hold the rows of the loss alone.

    Raises:
        VerificationError: naming the node and the invariant.
    """
    reached = set(stages)
    unknown = reached - set(STAGES)
    if unknown:
        raise VerificationError(f"unknown stage {sorted(unknown)}")
    try:
        gm.graph.lint()
    except Exception as error:  # fx raises RuntimeError, AssertionError and KeyError alike
        raise VerificationError(f"the graph is malformed: {error}") from error
    narrowed = {output.index for output in loss_rows.outputs} if loss_rows else set()
    added = len({output.rows for output in loss_rows.outputs}) if loss_rows else 0
    _check_interface(gm, captured, added)
    known = {node.name for node in captured.graph.nodes}
    for node in gm.graph.nodes:
        _check_tag(node, known, inlined="ac_graph_id" in node.meta)
    if "canonical" in reached:
        _check_canonical(gm, set(parameters))
    _check_sparse_ops(gm, lowered="lowered" in reached)
    if os.environ.get("SPARSELORA_VERIFY", "0") not in ("", "0"):
        _check_outputs(gm, captured, narrowed)


def _check_interface(gm: fx.GraphModule, captured: fx.GraphModule, added: int) -> None:
    before, after = (
        [node.name for node in module.graph.nodes if node.op == "placeholder"] for module in (captured, gm)
    )
    if before != after:
        raise VerificationError(f"the inputs changed: {set(before) ^ set(after) or 'their order'}")
    returned = _output(gm).args[0]
    if added:
        assert isinstance(returned, tuple | list), "positions of rows are added to several outputs"
        returned = returned[:-added]
    structures = [flattened(each)[1] for each in (_output(captured).args[0], returned)]
    if structures[0] != structures[1]:
        raise VerificationError(f"the outputs changed from {structures[0]} to {structures[1]}")


def _output(gm: fx.GraphModule) -> fx.Node:
    return gm.graph.output_node()


def _check_tag(node: fx.Node, known: set[str], *, inlined: bool) -> None:
    if node.name not in known and not inlined and TAG not in node.meta:
        raise VerificationError(f"{node.name} was inserted without a tag: use Rewriter")


def _check_canonical(gm: fx.GraphModule, parameters: set[str]) -> None:
    for node in gm.graph.nodes:
        if not calls_torch(node) or op_name(node) not in MATMULS or len(node.args) < 2:
            continue
        x, weight = tensor_value(node.args[0]), node.args[1]
        value = tensor_value(weight)
        if x is not None and x.dim() < 2:
            continue  # a vector has no tokens
        if isinstance(weight, fx.Node) and weight.name in parameters and value is not None and value.dim() == 2:
            raise VerificationError(f"{node.name} multiplies with the parameter {weight.name} and is no linear")


def _check_sparse_ops(gm: fx.GraphModule, *, lowered: bool) -> None:
    splits = [node for node in gm.graph.nodes if node.target in (_OPS.split_tokens.default, _OPS.token_slots.default)]
    if len(splits) > 1:
        raise VerificationError("tokens are split by role more than once: each split is a host synchronisation")
    rows = {user for split in splits for user in split.users}
    for node in gm.graph.nodes:
        first = {_OPS.take_rows.default: 1, _OPS.put_rows.default: 2}.get(node.target)
        if first is not None:
            if not set(node.args[first : first + 2]) <= rows:
                raise VerificationError(f"{node.name} does not use the rows of the one split")
            if lowered and "provider" not in node.kwargs:
                raise VerificationError(f"{node.name} has no provider")
        reason = _NEVER_AGAIN.get(node.target)
        if reason and node.meta.get("recompute") is not CheckpointPolicy.MUST_SAVE:
            raise VerificationError(f"{node.name} could be recomputed: {reason}")


def _check_outputs(gm: fx.GraphModule, captured: fx.GraphModule, narrowed: set[int]) -> None:
    expected = [tensor_value(node) for node in flattened(_output(captured).args[0])[0]]
    found = fake_outputs(gm)
    if found is None:
        return
    leaves, _ = flattened(_output(gm).args[0])
    actual = [found.get(node.name) if isinstance(node, fx.Node) else None for node in leaves]
    # Positions of rows come last; outputs that are narrowed differ on purpose.
    for index, (before, after) in enumerate(zip(expected, actual, strict=False)):
        if index not in narrowed and isinstance(before, Tensor) and isinstance(after, Tensor):
            shapes = [tuple(size_hint(size) for size in value.shape) for value in (before, after)]
            if shapes[0] != shapes[1] or before.dtype != after.dtype:
                raise VerificationError(f"an output of {before.dtype} {shapes[0]} became {after.dtype} {shapes[1]}")
