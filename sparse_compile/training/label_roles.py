"""Have a model's labels open `token_roles` wherever its forward is called: for graphs that are cut before the loss.

Under FSDP2 each block is a graph of its own, and the labels are seen by the last graph alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from sparse_compile.training import roles
from sparse_compile.training.roles import token_roles
from sparse_compile.training.token_capacity import known_tokens

__all__ = ["LabelRoles", "announced_labels"]


class LabelRoles:
    """Open the roles of a batch before each training forward of a model that is called with `labels=`.

    They stay open until `close`, beyond the forward: a checkpoint that is run again in the backward reads them too. A
    second forward before that would have such a checkpoint read the roles of another batch, so it is refused where the
    model has checkpoints.

    Args:
        model: the whole model: hooks are put on it.
        ignore_index: the label that the loss ignores.
    """

    def __init__(self, model: nn.Module, ignore_index: int = -100) -> None:
        self._model = model
        self._ignore_index = ignore_index
        self._open: AbstractContextManager[Tensor] | None = None
        self._hook = model.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def close(self) -> None:
        """End the roles of the last forward; to be called when its backward is done."""
        if self._open is not None:
            self._open.__exit__(None, None, None)
            self._open = None

    def remove(self) -> None:
        """Take the hook off the model."""
        self.close()
        self._hook.remove()

    # The graph is cut at the hooks of FSDP2 anyway; Dynamo cannot trace what roles are kept in.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return
        if self._open is not None and _has_checkpoints(self._model):
            raise RuntimeError(
                "sparselora: two training forwards before an optimizer step's callback, in a sharded model with "
                "gradient checkpointing: the recomputation of the first would read the roles of the second. Open "
                "`token_roles(labels=...)` around each forward and its backward yourself, or train without checkpoints"
            )
        self.close()
        labels = kwargs.get("labels")
        if isinstance(labels, Tensor) and labels.dim() == 2:
            self._open = token_roles(labels=labels, ignore_index=self._ignore_index)
            self._open.__enter__()


def announced_labels(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Return what announces the labels of a model's training call, for `token_bucket`; nothing where roles are given.

    Args:
        args: positional arguments of the call.
        kwargs: its other arguments.
    """
    labels = kwargs.get("labels")
    is_known = isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point()
    if not is_known or roles.ROLES_GIVEN or not torch.is_grad_enabled():
        return nullcontext()
    assert isinstance(labels, Tensor)
    return known_tokens(labels)


def _has_checkpoints(model: nn.Module) -> bool:
    return any(vars(module).get("gradient_checkpointing", False) for module in model.modules())
