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

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sparse_compile.graph import argument, calls_torch, hinted_shape, op_name, tensor_value
from sparse_compile.ir import Rejection, TokenRoles
from sparse_compile.passes.base import Numerics, PassContext, PassOutcome

_VIEWS = {"view", "reshape", "flatten", "squeeze", "unsqueeze"}
_SAME = {"to", "contiguous", "clone", "long", "int", "float", "type", "double", "bfloat16", "half", "type_as", "detach"}
_MOVES = {
    "transpose", "permute", "swapaxes", "swapdims", "movedim", "flip", "roll", "index_select", "gather", "getitem",
}  # fmt: skip
"""Ops that may put rows elsewhere while the shape stays as it is."""
_IGNORED = -1


@dataclass(frozen=True)
class TraceRoles:
    """Record in `ctx.roles` where the roles of the tokens come from."""

    name: str = "trace_roles"
    requires: tuple[str, ...] = ("canonical",)
    ensures: tuple[str, ...] = ("roles",)
    numerics: Numerics = Numerics.EXACT
    analysis: bool = True
    optimises: bool = False

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassOutcome:
        """Read the graph."""
        rejections: list[Rejection] = []
        padding = _padding_mask(gm.graph)
        if ctx.roles_given:
            ctx.roles = TokenRoles("given", (), ctx.config.ignore_index, padding)
            return PassOutcome(False, {"given": 1})
        ctx.roles = _from_losses(gm.graph, padding, rejections) or _from_comparison(gm.graph, ctx, padding)
        if ctx.roles is None and not rejections:
            rejections.append(Rejection(self.name, "graph", _reason_without_labels(gm.graph, ctx)))
        return PassOutcome(False, {"losses": len(ctx.roles.loss) if ctx.roles else 0}, tuple(rejections))


def _from_losses(graph: fx.Graph, padding: str | None, rejections: list[Rejection]) -> TokenRoles | None:
    labels: dict[tuple[str, int], None] = {}
    losses: list[str] = []
    ignored: set[int] = set()
    for node in graph.nodes:
        if op_name(node) != "cross_entropy" or not calls_torch(node):
            continue
        try:
            root, shift = _labels_of(node)
        except _UntraceableError as error:
            rejections.append(Rejection("trace_roles", node.name, str(error)))
            continue
        labels[root.name, shift] = None
        losses.append(node.name)
        ignored.add(int(argument(node, 4, "ignore_index", -100)))
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
        if op_name(node) not in ("ne", "eq", "__ne__", "__eq__") or ctx.config.ignore_index not in node.args[1:2]:
            continue
        try:
            root, _ = _root(node.args[0])
        except _UntraceableError:
            continue
        if _is_labels(root):
            return TokenRoles("labels", ((root.name, 1),), ctx.config.ignore_index, padding)
    return None


def _reason_without_labels(graph: fx.Graph, ctx: PassContext) -> str:
    inputs = [node for node in graph.nodes if node.op == "placeholder" and node.name not in ctx.parameters]
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


class _UntraceableError(Exception):
    """Carries the reason why positions cannot be followed."""


def _is_labels(node: fx.Node) -> bool:
    value = tensor_value(node)
    return value is not None and value.dim() == 2 and not value.is_floating_point() and value.dtype != torch.bool


def _labels_of(loss: fx.Node) -> tuple[fx.Node, int]:
    """Return the labels (B, S) a cross-entropy reads, and the shift between a token and the label it predicts."""
    logits, target = argument(loss, 0, "input"), argument(loss, 1, "target")
    target_value = tensor_value(target)
    if target_value is None or target_value.is_floating_point():
        raise _UntraceableError("the loss has class probabilities as its target")
    if len(hinted_shape(logits)) > 2:
        raise _UntraceableError("the classes of the loss are not its last dimension")
    root, chain = _root(target)
    if not _is_labels(root):
        raise _UntraceableError(f"the target comes from {root.name}, which is not an integer tensor (batch, tokens)")
    if not available_early(root):
        raise _UntraceableError(
            f"the target {root.name} is computed from activations: it is not known before the blocks"
        )
    labels = _replay(chain, torch.arange(tensor_numel(root)).view(hinted_shape(root)), drop_last=False).reshape(-1)
    tokens = _token_of_each_row(logits, hinted_shape(root)).reshape(-1)
    assert labels.shape == tokens.shape, "a cross-entropy has a target for each row of logits"
    read = labels != _IGNORED
    length = hinted_shape(root)[1]
    for shift in (1, 0):
        # A row at the end of a sequence has no next label; if it reads one, it is another sequence's.
        inside = (tokens[read] % length + shift) < length
        if bool((labels[read] == tokens[read] + shift).all()) and bool(inside.all()):
            return root, shift
    raise _UntraceableError("a row of the loss reads neither its own token's label nor the next one's")


def _root(node: object) -> tuple[fx.Node, list[fx.Node]]:
    """Walk back through ops that only move labels; return the tensor they come from and the ops, in order."""
    chain: list[fx.Node] = []
    while isinstance(node, fx.Node) and op_name(node) in _VIEWS | _SAME | {"getitem", "pad", "slice"}:
        if not isinstance(node.args[0], fx.Node) or tensor_value(node.args[0]) is None:
            break
        chain.append(node)
        node = node.args[0]
    if not isinstance(node, fx.Node) or tensor_value(node) is None:
        raise _UntraceableError("the target is no tensor of the graph")
    return node, chain[::-1]


def available_early(node: fx.Node) -> bool:
    """Tell whether `node` depends on inputs that are no floating-point tensors alone."""
    seen: set[fx.Node] = set()
    frontier = [node]
    while frontier:
        current = frontier.pop()
        if current in seen:
            continue
        seen.add(current)
        value = tensor_value(current)
        if value is not None and value.is_floating_point():
            return False
        frontier += current.all_input_nodes
    return True


def _token_of_each_row(logits: fx.Node, shape: tuple[int, ...]) -> Tensor:
    """Return, for each row of logits that the loss reads, the flattened position of the token it was computed for."""
    chain: list[fx.Node] = []
    node, (batch, length) = logits, shape
    while op_name(node) in _VIEWS | _SAME | {"getitem", "slice"} and tensor_value(node.args[0]) is not None:
        chain.append(node)
        node = node.args[0]  # type: ignore[assignment]
    size = hinted_shape(node)
    if op_name(node) in _MOVES or size[:-1] not in ((batch, length), (batch * length,)):
        raise _UntraceableError(f"the rows of the logits cannot be followed through {node.name}")
    return _replay(chain[::-1], torch.arange(batch * length).view(size[:-1]), drop_last=True)


def _replay(chain: list[fx.Node], positions: Tensor, *, drop_last: bool) -> Tensor:
    """Apply ops that move rows to a tensor of positions, at the sizes seen at tracing.

    Args:
        chain: the ops, in order.
        positions: what to move.
        drop_last: the ops act on tensors with one more, last dimension (the vocabulary).
    """
    for node in chain:
        shape = hinted_shape(node)[:-1] if drop_last else hinted_shape(node)
        if op_name(node) in _SAME:
            continue
        if op_name(node) in _VIEWS:
            positions = positions.reshape(shape)
        elif op_name(node) == "pad":
            pad, value = node.args[1], argument(node, 3, "value")
            positions = torch.nn.functional.pad(positions, pad, value=_IGNORED)  # type: ignore[arg-type]
            if value is None:
                raise _UntraceableError("the target is padded with label 0, not with ignore_index")
        elif op_name(node) == "getitem":
            positions = _sliced(positions, node, drop_last=drop_last)
        else:
            raise _UntraceableError(f"positions cannot be followed through {node.name}")
        if tuple(positions.shape) != shape:
            raise _UntraceableError(f"positions cannot be followed through {node.name}")
    return positions


def _sliced(positions: Tensor, node: fx.Node, *, drop_last: bool) -> Tensor:
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    parts: list[Any] = []
    for part in index:
        if isinstance(part, slice):
            bounds = [_as_int(bound) for bound in (part.start, part.stop, part.step)]
            parts.append(slice(*bounds))
        elif part is None or part is Ellipsis or isinstance(part, int):
            parts.append(part)
        else:
            raise _UntraceableError(f"{node.name} picks rows by a tensor")
    if drop_last:
        positions = positions.unsqueeze(-1)
        rank = positions.dim()
        if Ellipsis not in parts and len([part for part in parts if part is not None]) < rank:
            parts.append(Ellipsis)
        return positions.expand(*positions.shape[:-1], hinted_shape(node.args[0])[-1])[tuple(parts)][..., 0]  # type: ignore[arg-type]
    return positions[tuple(parts)]


def _as_int(bound: object) -> int | None:
    """Return a slice bound as the number seen at tracing."""
    if isinstance(bound, fx.Node):
        bound = bound.meta.get("example_value")
    if bound is None or isinstance(bound, int):
        return bound
    hint = getattr(getattr(bound, "node", None), "hint", None)
    if hint is None:
        raise _UntraceableError("a slice bound is not known at tracing")
    return int(hint)


def tensor_numel(node: fx.Node) -> int:
    """Return the number of elements of a tensor node, as seen at tracing."""
    count = 1
    for size in hinted_shape(node):
        count *= size
    return count


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
    if op_name(user) in ("eq", "ne", "__eq__", "__ne__"):
        return any(isinstance(arg, int) and arg in (0, 1) for arg in user.args[1:])
    # `1 - mask`, the additive mask of older models.
    numbers = [arg for arg in user.args if not isinstance(arg, fx.Node)]
    return op_name(user) in ("rsub", "__rsub__", "sub") and numbers in ([1], [1.0])
