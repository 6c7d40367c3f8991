"""What autocast does at each node of a captured graph.

Autocast reaches a graph in two ways: it was on when the graph was captured (a plain loop's `with torch.autocast`), or
the graph switches it (Accelerate wraps the model's forward, which leaves `_enter_autocast` and `_exit_autocast` nodes).
PyTorch's own ops follow it as the graph is traced again; custom ops do not, so inserted nodes cast explicitly.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from sparse_compile.graph.read import argument, op_name


def autocast_dtypes(graph: fx.Graph, ambient: Mapping[str, object], device: str) -> dict[str, torch.dtype | None]:
    """Return, by node name, the dtype that autocast casts products to where the node runs; None where it is off.

    Args:
        graph: the graph.
        ambient: by device type, the dtype of the autocast that was on when the graph was captured.
        device: the device type asked for.
    """
    current = ambient.get(device)
    assert current is None or isinstance(current, torch.dtype)
    stack: list[torch.dtype | None] = []
    dtypes: dict[str, torch.dtype | None] = {}
    for node in graph.nodes:
        if op_name(node) == "_enter_autocast":
            stack.append(current)
            dtype = argument(node, "dtype")
            if argument(node, "device_type") == device:
                default = torch.get_autocast_dtype(device)
                enabled = argument(node, "enabled", True)
                current = (dtype if isinstance(dtype, torch.dtype) else default) if enabled else None
        elif op_name(node) == "_exit_autocast":
            current = stack.pop() if stack else None
        dtypes[node.name] = current
    return dtypes
