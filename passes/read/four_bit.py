"""Know the calls of bitsandbytes in a graph, and mark the weights that they dequantise."""

from __future__ import annotations

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy


def calls_bitsandbytes(node: fx.Node, operator: str) -> bool:
    """Tell whether a node calls an operator of bitsandbytes, or one overload of it."""
    return node.op == "call_function" and str(node.target).split(".")[:2] == ["bitsandbytes", operator]


def mark_for_recomputation(dense: fx.Node) -> None:
    """Have the backward pass dequantise again, whether the products around are in a checkpoint or not.

    The mark has no checkpoint's number: the partitioner would save what lies between two neighbouring checkpoints.
    """
    dense.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    dense.meta.pop("ac_graph_id", None)
