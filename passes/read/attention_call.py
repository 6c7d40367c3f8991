"""Match the one call of an attention, or a softmax between two products: which tensors are query, key and value.

    %w = softmax(%q @ %k^T * s + mask)              %w = softmax(cat(%q @ %k^T, sinks))[..., :-1]
    %a = %w @ %v                                    %a = %w @ %v

Nothing is said of heads here (`head_layout`), nor of what makes query, key and value.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from sparse_compile.graph.read import argument, calls_torch, factors, hinted_shape, op_name, tensor_value
from sparse_compile.graph.vocabulary import MATMULS, PRODUCTS, REGROUPINGS, SOFTMAXES
from sparse_compile.passes.read.elementwise import is_elementwise, tensor_operands


@dataclass(frozen=True)
class AttentionCall:
    """The operands of one attention, however it is spelt."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    result: fx.Node
    key_transposed: bool


def attention_at(node: fx.Node) -> AttentionCall | None:
    """Return the attention whose one call, or whose softmax, a node is; None where it is neither."""
    return _sdpa(node) or _softmax_attention(node)


def _sdpa(node: fx.Node) -> AttentionCall | None:
    if op_name(node) != "scaled_dot_product_attention":
        return None
    query, key, value = (argument(node, name) for name in ("query", "key", "value"))
    return AttentionCall(query, key, value, node, key_transposed=False)


def _softmax_attention(node: fx.Node) -> AttentionCall | None:
    """Match `softmax(q @ k^T ...) @ v` around a softmax node.

    Scaling, masking, casts, dropout and views that keep queries and keys may come between. Learned scores (attention
    sinks) may stand behind those of the keys; their weights must be gone again before the product with the values.
    """
    if op_name(node) not in SOFTMAXES or not calls_torch(node):
        return None
    scores = _scores_of(node)
    weights = node
    while len(weights.users) == 1 and _passes_weights(next(iter(weights.users)), weights):
        weights = next(iter(weights.users))
    product = next(iter(weights.users)) if len(weights.users) == 1 else None
    if scores is None or product is None or op_name(product) not in MATMULS:
        return None
    read, value = factors(product)
    if read is not weights or hinted_shape(weights)[-2:] != hinted_shape(scores)[-2:]:
        return None
    query, key = factors(scores)
    if not all(isinstance(each, fx.Node) for each in (query, key, value)):
        return None
    return AttentionCall(query, key, value, product, key_transposed=True)


def _scores_of(softmax: fx.Node) -> fx.Node | None:
    """Walk back from a softmax to the product of queries and keys; None where the way is not clear."""
    scores = argument(softmax, "input")
    while isinstance(scores, fx.Node) and op_name(scores) not in PRODUCTS:
        name, shape = op_name(scores), hinted_shape(scores)
        operands = [operand for operand in tensor_operands(scores) if operand.op != "get_attr"]
        if name in ("cat", "concat"):
            joined = argument(scores, "tensors")
            if int(argument(scores, "dim", 0)) % len(shape) != len(shape) - 1 or not _leads_to_product(joined[0]):
                return None
            inner = [joined[0]]
        elif name in REGROUPINGS:
            inner = [each for each in operands[:1] if hinted_shape(each)[-2:] == shape[-2:]]
        elif is_elementwise(scores) or name in ("masked_fill", "where"):
            inner = [operand for operand in operands if hinted_shape(operand) == shape]
        else:
            return None
        if len(inner) > 1:
            # An additive mask of full shape: the scores are the operand that a product leads to.
            inner = [operand for operand in inner if _leads_to_product(operand)]
        if len(inner) != 1:
            return None
        scores = inner[0]
    return scores if isinstance(scores, fx.Node) else None


def _passes_weights(node: fx.Node, weights: fx.Node) -> bool:
    """Tell whether a call only passes on the weights of the keys, element by element or a view of them."""
    if is_elementwise(node):
        return True
    value = tensor_value(node)
    if value is None:
        return False
    if op_name(node) in REGROUPINGS:
        return hinted_shape(node)[-2:] == hinted_shape(weights)[-2:]
    if op_name(node) != "getitem" or hinted_shape(node)[:-1] != hinted_shape(weights)[:-1]:
        return False
    # The first weights are those of the keys; what stands behind them is left out.
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    parts = [part for part in index if part is not Ellipsis]
    return all(isinstance(part, slice) and part.start in (None, 0) and part.step in (None, 1) for part in parts)


def _leads_to_product(node: fx.Node) -> bool:
    while is_elementwise(node) or op_name(node) in REGROUPINGS:
        node = tensor_operands(node)[0]
    return op_name(node) in PRODUCTS
