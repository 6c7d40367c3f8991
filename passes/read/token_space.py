"""Tell which activations belong to the tokens whose roles are known.

A model may have several token spaces (the encoder and the decoder of a translation model), and two of them may have the
same shape by chance. The roles belong to the tokens that the loss is computed for, so we walk back from its logits.
Every op keeps the tokens of its input, except attention: its rows are the query's, while keys and values may belong to
other tokens.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, fx

from sparse_compile.graph.facts import TokenRoles
from sparse_compile.graph.read import argument, factors, nodes_by_name, op_name, value_of
from sparse_compile.graph.vocabulary import LINEAR, PRODUCTS
from sparse_compile.graph.walk import reach


def token_space(graph: fx.Graph, roles: TokenRoles) -> set[str]:
    """Return the names of the nodes that hold activations of the tokens the roles speak of.

    Where the loss is not in the graph, these are the tokens of the graph's outputs.
    """
    nodes = nodes_by_name(graph)
    if roles.loss:
        starts = [argument(nodes[name], "input") for name in roles.loss]
    else:
        starts = graph.output_node().all_input_nodes
    return {node.name for node in reach(starts, _operands_with_the_same_tokens)}


def _operands_with_the_same_tokens(node: fx.Node) -> Iterable[fx.Node]:
    if op_name(node) == "scaled_dot_product_attention":
        return [argument(node, "query")]
    if node.target is LINEAR:
        return [argument(node, "input")]
    if op_name(node) in PRODUCTS:
        # Written-out attention: the rows of `q @ k^T` are the query's, those of `weights @ v` the weights'.
        first, _ = factors(node)
        return [first] if isinstance(first, fx.Node) else []
    # What `chunk` and `split` return is a tuple of tensors.
    return [operand for operand in node.all_input_nodes if isinstance(value_of(operand), Tensor | tuple | list)]
