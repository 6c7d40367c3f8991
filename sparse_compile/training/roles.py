"""Let a training loop say which tokens are output tokens, where the compiled graph cannot see it.

Roles are read from the loss inside the graph wherever it is there. Where it is outside (a loss of one's own on the
logits, a graph that was cut before the loss), the loop names them:

    with token_roles(labels=batch["labels"]):
        logits = model(input_ids=batch["input_ids"]).logits
    loss = my_loss(logits, batch["labels"])
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Final

import torch
from torch import Tensor

from sparse_compile.kernels.roles import reference
from sparse_compile.kernels.roles.given import pop_roles, push_roles
from sparse_compile.training.token_capacity import announce, withdraw

__all__ = ["ROLES_GIVEN", "token_roles"]

ROLES_GIVEN: bool = False
"""Whether any `token_roles` block is open in this process.

A graph that reads roles and one that does not are two graphs, so this is what Dynamo guards on. The roles themselves
are kept in a ContextVar (`kernels/roles/given.py`), which Dynamo can neither trace nor guard; this mirror is a plain
module attribute, which a guard compares without running any Python. It is coarser by design: it spans all threads. A
thread without roles of its own may therefore run a graph that asks for roles, and `current_roles` answers None there.
"""

_open_blocks = 0
_OPEN_LOCK: Final = threading.Lock()


def token_roles(
    labels: Tensor | None = None, output_mask: Tensor | None = None, ignore_index: int = -100
) -> AbstractContextManager[Tensor]:
    """Name the output tokens of the forward passes inside the block.

    Exactly one of `labels` and `output_mask` is given. With labels, position t is an output token if `labels[t]` or
    `labels[t + 1]` (the target that it predicts) is not `ignore_index`; all others are context. The block ends the
    roles whatever happens inside; blocks nest, the innermost counts, and one block may be entered again.

    Args:
        labels: integers of shape (B, S), not shifted, as Hugging Face models take them.
        output_mask: shape (B, S); bool, or integers 0 and 1. The values of an integer mask are checked, which waits
            for the device: give bool on a GPU.
        ignore_index: the label that the loss ignores.

    Returns:
        A context manager that gives the mask of output tokens, bool of shape (B, S).

    Raises:
        ValueError: none or both were given, or shape, dtype or values are not as said above.
    """
    if (labels is None) == (output_mask is None):
        raise ValueError("token_roles takes exactly one of labels= and output_mask=")
    if labels is not None:
        return _RolesBlock(reference.output_mask(_checked(labels, "labels"), ignore_index, shift=1))
    assert output_mask is not None
    mask = _checked(output_mask, "output_mask")
    if mask.dtype != torch.bool and bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError("token_roles: an integer output_mask may hold only 0 and 1")
    return _RolesBlock(mask.to(torch.bool))


class _RolesBlock(AbstractContextManager[Tensor]):
    """Put a mask in force; nothing is kept of an entry, so a block can be entered again, and by several threads."""

    def __init__(self, mask: Tensor) -> None:
        self._mask = mask

    def __enter__(self) -> Tensor:
        push_roles(self._mask)
        _count_open(+1)
        announce(self._mask, None)
        return self._mask

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        pop_roles()
        _count_open(-1)
        withdraw(self._mask)


def _count_open(change: int) -> None:
    """Keep `ROLES_GIVEN` in step with the number of open blocks."""
    global ROLES_GIVEN, _open_blocks
    with _OPEN_LOCK:
        _open_blocks += change
        assert _open_blocks >= 0
        ROLES_GIVEN = _open_blocks > 0


def _checked(tensor: Tensor, name: str) -> Tensor:
    """Return a tensor of shape (B, S) that holds integers, or bools for a mask."""
    if not isinstance(tensor, Tensor):
        raise ValueError(
            f"token_roles: {name} must be a tensor of shape (batch, sequence), got {type(tensor).__name__}"
        )
    if tensor.dim() != 2:
        raise ValueError(f"token_roles: {name} must have shape (batch, sequence), got {tuple(tensor.shape)}")
    is_bool = tensor.dtype == torch.bool
    if tensor.is_floating_point() or tensor.is_complex() or (is_bool and name == "labels"):
        wanted = "integers" if name == "labels" else "bools, or integers 0 and 1"
        raise ValueError(f"token_roles: {name} must hold {wanted}, got {tensor.dtype}")
    return tensor
