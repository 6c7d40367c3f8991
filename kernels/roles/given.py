"""Hold the token roles that a training loop gives, for the op that reads them when a graph runs.

`sparse_compile.training.roles` is what puts them here: a training loop opens `token_roles(...)`.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Final

from torch import Tensor

# An immutable tuple: a thread or a task that starts with a copy of this context cannot change what the first one sees.
_STACK: Final[ContextVar[tuple[Tensor, ...]]] = ContextVar("sparse_compile_token_roles", default=())


def push_roles(mask: Tensor) -> None:
    """Put roles in force in this thread or task.

    Args:
        mask: the output tokens, bool of shape (B, S).
    """
    _STACK.set((*_STACK.get(), mask))


def pop_roles() -> None:
    """End the roles that were put in force last in this thread or task."""
    _STACK.set(_STACK.get()[:-1])


def current_roles() -> Tensor | None:
    """Return the mask of output tokens that is in force in this thread, bool of shape (B, S); None where none is."""
    stack = _STACK.get()
    return stack[-1] if stack else None
