"""Follow the positions of labels and logits, to tell which label each row of a loss reads."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from sparse_compile.graph.declined import Declined
from sparse_compile.graph.read import argument, hinted_shape, op_name, tensor_value
from sparse_compile.graph.vocabulary import CASTS, COPIES, VIEWS
from sparse_compile.graph.walk import reach

_SAME = CASTS | COPIES | {"long", "int"}


_MOVES = {
    "transpose", "permute", "swapaxes", "swapdims", "movedim", "flip", "roll", "index_select", "gather", "getitem",
}  # fmt: skip
"""Ops that may put rows elsewhere while the shape stays as it is."""


_IGNORED = -1


def is_labels(node: fx.Node) -> bool:
    """Tell whether a node holds an integer tensor (batch, tokens)."""
    value = tensor_value(node)
    return value is not None and value.dim() == 2 and not value.is_floating_point() and value.dtype != torch.bool


def labels_of(loss: fx.Node) -> tuple[fx.Node, int]:
    """Return the labels (B, S) that a cross-entropy reads, and the shift between a token and the label it predicts.

    Raises:
        Declined: positions cannot be followed, or the labels are not known before the first block.
    """
    logits, target = argument(loss, "input"), argument(loss, "target")
    target_value = tensor_value(target)
    if target_value is None or target_value.is_floating_point():
        raise Declined(loss, "the loss has class probabilities as its target")
    if len(hinted_shape(logits)) > 2:
        raise Declined(loss, "the classes of the loss are not its last dimension")
    found = label_root(target)
    if found is None:
        raise Declined(loss, "the target is no tensor of the graph")
    root, chain = found
    if not is_labels(root):
        raise Declined(loss, f"the target comes from {root.name}, which is not an integer tensor (batch, tokens)")
    if not available_early(root):
        raise Declined(root, f"the target {root.name} is computed from activations: it is not known before the blocks")
    positions = torch.arange(math.prod(hinted_shape(root))).view(hinted_shape(root))
    ignored = argument(loss, "ignore_index", -100)
    labels = _replay(chain, positions, drop_last=False, ignored=ignored).reshape(-1)
    tokens = _token_of_each_row(logits, hinted_shape(root)).reshape(-1)
    if labels.shape != tokens.shape:
        raise Declined(loss, f"the loss has {labels.numel()} targets for {tokens.numel()} rows of logits")
    read = labels != _IGNORED
    length = hinted_shape(root)[1]
    for shift in (1, 0):
        # A row at the end of a sequence has no next label; if it reads one, it is another sequence's.
        inside = (tokens[read] % length + shift) < length
        if bool((labels[read] == tokens[read] + shift).all()) and bool(inside.all()):
            return root, shift
    raise Declined(loss, "a row of the loss reads neither its own token's label nor the next one's")


def label_root(node: object) -> tuple[fx.Node, list[fx.Node]] | None:
    """Walk back through ops that only move labels; return the tensor they come from and the ops, in order.

    None where they come from no tensor of the graph.
    """
    chain: list[fx.Node] = []
    while isinstance(node, fx.Node) and op_name(node) in VIEWS | _SAME | {"getitem", "pad", "slice"}:
        source = argument(node, "input")
        if tensor_value(source) is None:
            break
        chain.append(node)
        node = source
    if not isinstance(node, fx.Node) or tensor_value(node) is None:
        return None
    return node, chain[::-1]


def available_early(node: fx.Node) -> bool:
    """Tell whether `node` depends on inputs that are no floating-point tensors alone."""
    met = reach([node], lambda each: () if _is_floating(each) else each.all_input_nodes)
    return not any(map(_is_floating, met))


def _is_floating(node: fx.Node) -> bool:
    value = tensor_value(node)
    return value is not None and value.is_floating_point()


def _token_of_each_row(logits: fx.Node, shape: tuple[int, ...]) -> Tensor:
    """Return, for each row of logits that the loss reads, the flattened position of the token it was computed for."""
    chain: list[fx.Node] = []
    node, (batch, length) = logits, shape
    while op_name(node) in VIEWS | _SAME | {"getitem", "slice"} and tensor_value(argument(node, "input")) is not None:
        chain.append(node)
        node = argument(node, "input")
    size = hinted_shape(node)
    if op_name(node) in _MOVES or size[:-1] not in ((batch, length), (batch * length,)):
        raise Declined(node, f"the rows of the logits cannot be followed through {node.name}")
    return _replay(chain[::-1], torch.arange(batch * length).view(size[:-1]), drop_last=True)


def _replay(chain: list[fx.Node], positions: Tensor, *, drop_last: bool, ignored: object = None) -> Tensor:
    """Apply ops that move rows to a tensor of positions, at the sizes seen at tracing.

    Args:
        chain: the ops, in order.
        positions: what to move.
        drop_last: the ops act on tensors with one more, last dimension (the vocabulary).
        ignored: the label that has no loss, which labels may be padded with.
    """
    for node in chain:
        shape = hinted_shape(node)[:-1] if drop_last else hinted_shape(node)
        if op_name(node) in _SAME:
            continue
        if op_name(node) in VIEWS:
            positions = positions.reshape(shape)
        elif op_name(node) == "pad":
            mode, value = argument(node, "mode", "constant"), argument(node, "value") or 0
            if mode != "constant" or value != ignored:
                label = f"label {value}" if mode == "constant" else "labels"
                raise Declined(node, f"the target is padded with {label}, not with ignore_index")
            positions = torch.nn.functional.pad(positions, argument(node, "pad"), value=_IGNORED)
        elif op_name(node) == "getitem":
            positions = _sliced(positions, node, drop_last=drop_last)
        else:
            raise Declined(node, f"positions cannot be followed through {node.name}")
        if tuple(positions.shape) != shape:
            raise Declined(node, f"positions cannot be followed through {node.name}")
    return positions


def _sliced(positions: Tensor, node: fx.Node, *, drop_last: bool) -> Tensor:
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    parts: list[Any] = []
    for part in index:
        if isinstance(part, slice):
            bounds = [_as_int(bound, node) for bound in (part.start, part.stop, part.step)]
            parts.append(slice(*bounds))
        elif part is None or part is Ellipsis or isinstance(part, int):
            parts.append(part)
        else:
            raise Declined(node, f"{node.name} picks rows by a tensor")
    if drop_last:
        positions = positions.unsqueeze(-1)
        rank = positions.dim()
        if Ellipsis not in parts and len([part for part in parts if part is not None]) < rank:
            parts.append(Ellipsis)
        return positions.expand(*positions.shape[:-1], hinted_shape(node.args[0])[-1])[tuple(parts)][..., 0]  # type: ignore[arg-type]
    return positions[tuple(parts)]


def _as_int(bound: object, node: fx.Node) -> int | None:
    """Return a bound of the slice `node` as the number seen at tracing."""
    if isinstance(bound, fx.Node):
        bound = bound.meta.get("example_value")
    if bound is None or isinstance(bound, int):
        return bound
    hint = getattr(getattr(bound, "node", None), "hint", None)
    if hint is None:
        raise Declined(node, "a slice bound is not known at tracing")
    return int(hint)
