"""Know models whose parameters are sharded over ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

__all__ = ["any_in_parts", "is_sharded"]


def is_sharded(model: nn.Module) -> bool:
    """Tell whether `fully_shard` was applied to a model or to a part of it."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def any_in_parts(values: Iterable[object]) -> bool:
    """Tell whether one of the inputs of a graph is a DTensor, of which this rank may hold a part (tensor parallel)."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(value, DTensor) for value in values)
