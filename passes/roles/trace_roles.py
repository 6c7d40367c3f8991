"""Find out, before the first block runs, which tokens are output and which are context.

The loss tells. From the target of a cross-entropy we walk back to the integer tensor (B, S) it was taken from, through
views, slices and padding, following positions instead of values: which label each row of the loss reads, and which
token predicts it. One of two answers is understood, whatever the spelling:

    row of token t reads labels[:, t + 1]      shift 1: the usual causal loss
    row of token t reads labels[:, t]          shift 0: labels shifted beforehand

Without a loss in the graph (TRL's chunked loss, a loss outside), labels that the graph compares with `ignore_index`
serve as well, or the roles that `token_roles(...)` holds. A name alone decides nothing.

Declines when: the target is computed from something that is not at hand before the first block, or positions cannot be
followed, or the labels are not (B, S).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx

from sparse_compile.graph.declined import Declined
from sparse_compile.graph.facts import Rejection, TokenRoles
from sparse_compile.graph.read import argument, calls_torch, op_name, tensor_value
from sparse_compile.graph.vocabulary import EQUALITIES
from sparse_compile.passes.context import PassContext
from sparse_compile.passes.protocol import Pass, PassOutcome
from sparse_compile.passes.read.label_positions import is_labels, label_root, labels_of


class TraceRoles(Pass):
    """Record in `ctx.facts.roles` where the roles of the tokens come from."""

    requires = ("canonical",)
    ensures = ("roles",)
    analysis = True

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassOutcome:
        """Read the graph."""
        rejections: list[Rejection] = []
        padding = _padding_mask(gm.graph)
        if ctx.env.roles_given:
            ctx.facts = replace(ctx.facts, roles=TokenRoles("given", (), ctx.env.config.ignore_index, padding))
            return PassOutcome(False, {"given": 1})
        roles = _from_losses(gm.graph, padding, rejections) or _from_comparison(gm.graph, ctx, padding)
        ctx.facts = replace(ctx.facts, roles=roles)
        if roles is None and not rejections:
            rejections.append(Rejection(self.name, "graph", _reason_without_labels(gm.graph, ctx)))
        return PassOutcome(False, {"losses": len(roles.loss) if roles else 0}, tuple(rejections))


def _from_losses(graph: fx.Graph, padding: str | None, rejections: list[Rejection]) -> TokenRoles | None:
    labels: dict[tuple[str, int], None] = {}
    losses: list[str] = []
    ignored: set[int] = set()
    for node in graph.nodes:
        if op_name(node) != "cross_entropy" or not calls_torch(node):
            continue
        try:
            root, shift = labels_of(node)
        except Declined as declined:
            rejections.append(declined.by("trace_roles", at=node))
            continue
        labels[root.name, shift] = None
        losses.append(node.name)
        ignored.add(int(argument(node, "ignore_index", -100)))
    # A loss we could not follow may need rows that the others ignore: then nothing may be pruned.
    if rejections or not losses:
        return None
    if len(ignored) > 1:
        rejections.append(Rejection("trace_roles", losses[0], f"losses with different ignore_index {sorted(ignored)}"))
        return None
    return TokenRoles("cross_entropy", tuple(labels), ignored.pop(), padding, tuple(losses))


def _from_comparison(graph: fx.Graph, ctx: PassContext, padding: str | None) -> TokenRoles | None:
    """Find labels (B, S) that the graph compares with `ignore_index`, themselves or shifted by one."""
    for node in graph.nodes:
        if op_name(node) not in EQUALITIES or ctx.env.config.ignore_index != argument(node, "other"):
            continue
        found = label_root(argument(node, "input"))
        if found is not None and is_labels(found[0]):
            return TokenRoles("labels", ((found[0].name, 1),), ctx.env.config.ignore_index, padding)
    return None


def _reason_without_labels(graph: fx.Graph, ctx: PassContext) -> str:
    inputs = [node for node in graph.nodes if node.op == "placeholder" and node.name not in ctx.env.parameters]
    if not any(_was_made_to_require_gradients(tensor_value(node)) for node in inputs):
        return (
            "neither a cross-entropy nor labels compared with ignore_index are in the graph; pass `labels` to the "
            "model, or open `token_roles(labels=...)` around the forward. (transformers' Trainer keeps the labels from "
            "the model for label_smoothing_factor and compute_loss_func: do without, or open it in compute_loss)"
        )
    return (
        "the labels are in another graph, because TorchDynamo cuts the model where a hook makes the embedding's output "
        "require gradients (`enable_input_require_grads`, which transformers and PEFT call for gradient "
        "checkpointing). Compiled checkpointing does without it: before the first step call "
        "`model.disable_input_require_grads()`, or train with `SparseLoRACallback` in transformers' Trainer, or open "
        "`token_roles(labels=...)` around the forward"
    )


def _was_made_to_require_gradients(value: Tensor | None) -> bool:
    """Tell whether an input is an activation that was computed without gradients and requires them all the same."""
    return (
        value is not None and value.is_floating_point() and value.dim() >= 3 and value.requires_grad and value.is_leaf
    )


def _padding_mask(graph: fx.Graph) -> str | None:
    """Return the placeholder (B, S) whose zeros mark padding: an integer or bool input that the graph reads as a mask.

    Position ids and token type ids are integers (B, S) as well; only a mask is turned into bool, or compared with 0 or
    1.
    """
    found = []
    for node in graph.nodes:
        value = tensor_value(node)
        if node.op != "placeholder" or value is None or value.dim() != 2 or value.is_floating_point():
            continue
        if any(op_name(user) == "embedding" for user in node.users):
            continue  # token ids compared with the padding id: 0 means no padding there
        if value.dtype == torch.bool or any(_reads_as_mask(user) for user in node.users):
            found.append(node.name)
    return found[0] if len(found) == 1 else None


def _reads_as_mask(user: fx.Node) -> bool:
    value = tensor_value(user)
    if op_name(user) in ("to", "bool", "type") and value is not None:
        return value.dtype == torch.bool
    if op_name(user) in EQUALITIES:
        return any(isinstance(arg, int) and arg in (0, 1) for arg in user.args[1:])
    # `1 - mask`, the additive mask of older models.
    numbers = [arg for arg in user.args if not isinstance(arg, fx.Node)]
    return op_name(user) in ("rsub", "__rsub__", "sub") and numbers in ([1], [1.0])
