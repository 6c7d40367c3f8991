"""What autograd and the partitioner keep in private."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


def write_count(tensor: Tensor) -> int | None:
    """Return how often a tensor was written to in place, not counting `.data`; None for a tensor of inference mode."""
    return None if tensor.is_inference() else tensor._version


def next_checkpoint_id() -> int:
    """Return a fresh number for the nodes of one activation checkpoint, from PyTorch's own counter."""
    from torch._higher_order_ops.wrap import uid

    return next(uid)


def saving_what_is_marked() -> AbstractContextManager[Any]:
    """Have the partitioner save what is marked MUST_SAVE under any activation memory budget, while a graph is compiled.

    With a budget of 0 it saves a graph's inputs and nothing else, marked or not. The least budget above it recomputes
    all the rest as well.
    """
    from torch._functorch import config

    return config.patch(activation_memory_budget=max(config.activation_memory_budget, 1e-6))  # type: ignore[no-any-return]


def running_backward() -> int | None:
    """Return a number for the backward this thread is running, None outside of any."""
    task = torch._C._current_graph_task_id()
    return None if task == -1 else int(task)


def after_backward(callback: Callable[[], None]) -> None:
    """Have autograd call `callback` when the backward this thread is running has ended."""
    from torch.autograd import Variable

    Variable._execution_engine.queue_callback(callback)
