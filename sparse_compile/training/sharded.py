"""Know parameters that are sharded over ranks, and tie the shards of FSDP2 (`fully_shard`) to what graphs see.

FSDP2 gathers the parameters of a block before its forward and its backward, and puts the shards back afterwards. So
graphs are captured with gathered parameters, and an optimizer holds shards: no parameter is common to both. The model
is: it is remembered by the first of them, and between two steps its parameters are the shards.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from sparse_compile.training.session import Session

__all__ = ["any_in_parts", "is_sharded", "remember", "sessions_of", "shards"]

_SESSIONS: Final[weakref.WeakKeyDictionary[nn.Module, Session]] = weakref.WeakKeyDictionary()


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


def remember(model: nn.Module, session: Session) -> None:
    """Note the session of a sharded model, for as long as the model lives."""
    _SESSIONS[model] = session


def sessions_of(model: nn.Module) -> list[Session]:
    """Return the sessions remembered for a model, a model around it, or a part of it."""
    if model in _SESSIONS:
        return [_SESSIONS[model]]
    modules = set(model.modules())
    return [session for known, session in _SESSIONS.items() if known in modules or model in set(known.modules())]


def shards(wanted: set[int]) -> Iterator[tuple[Session, Tensor]]:
    """Yield the parameters of sharded models that have one of these ids, with the session of their model."""
    if not wanted:
        return
    for model, session in list(_SESSIONS.items()):
        yield from ((session, parameter) for parameter in model.parameters() if id(parameter) in wanted)
