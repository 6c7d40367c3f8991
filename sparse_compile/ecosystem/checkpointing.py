"""Let activation checkpointing, as transformers sets it up, and the compiler work together.

Checkpointing that re-enters autograd passes no gradient to the adapters of a block whose inputs need none. So
transformers and PEFT hook the embedding, to have its output require gradients (`enable_input_require_grads`).
TorchDynamo cannot trace that: it cuts the model there, and the graph of the blocks never sees the labels. Nor does it
need it: compiled checkpointing is never re-entrant.

This module imports transformers; only the trainer's callback uses it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from sparse_compile.torch_private.modules import backend_name, forward_hooks

__all__ = ["InputHooksOff", "without_input_hooks"]

_LOGGER = logging.getLogger(__name__)
_FUNCTION = "_gradient_checkpointing_func"


def without_input_hooks(model: nn.Module, *, tell: bool = True) -> ExitStack:
    """Take the hooks off that only make embeddings require gradients, and have checkpoints do without them.

    Legal because: whether an activation requires gradients changes no gradient of a parameter, but behind a re-entrant
    checkpoint. Checkpoints are made non-re-entrant meanwhile, as compiled ones are anyway: code that TorchDynamo leaves
    to eager PyTorch needs no hook either.
    Declines when: no part of the model is compiled for this backend; the hook is on no model of transformers, whose
    checkpoints can be told; a checkpoint is run by a function that is not PyTorch's.

    Args:
        model: what is about to be trained.
        tell: whether to log what was done, or why nothing was.

    Returns:
        What brings all of it back when it is closed. Empty where there was nothing to do.
    """
    undo = ExitStack()
    if not any(backend_name(module) == "sparselora" for module in model.modules()):
        return undo
    roots = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    hooked = {module for root in roots for module in root.modules() if _input_hooks(module)}
    if not hooked:
        return undo
    checkpointed = [module for module in model.modules() if vars(module).get("gradient_checkpointing", False)]
    functions = [_non_reentrant(vars(module).get(_FUNCTION)) for module in checkpointed]
    if not all(functions):
        _log(
            tell,
            "sparselora: the hook that makes the embedding's output require gradients stays, because checkpoints are "
            "run by a function that is not torch.utils.checkpoint.checkpoint: the model arrives in several graphs",
        )
        return undo
    for module, function in zip(checkpointed, functions, strict=True):
        undo.callback(_put_back, module, vars(module)[_FUNCTION], instead_of=function)
        setattr(module, _FUNCTION, function)
    for module in hooked:
        hooks = forward_hooks(module)
        for key in _input_hooks(module):
            # Under its old key, so that the handle that the model keeps can still remove it.
            undo.callback(hooks.__setitem__, key, hooks.pop(key))
    _log(
        tell,
        "sparselora: took off the hook that makes the embedding's output require gradients, until training ends: the "
        "compiler would cut the graph there, and compiled checkpointing does without it",
    )
    return undo


class InputHooksOff:
    """Keep such hooks off a model while it trains, whoever sets them anew.

    TRL's DPO computes its reference in each step with checkpointing switched off; where it is switched on again,
    transformers hooks the embedding again and sets checkpoint functions of its own.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._undo = without_input_hooks(model)

    def renew(self) -> None:
        """Take off what was set since; what was there before it is no more, so it is not brought back."""
        if any(_input_hooks(module) for module in self._model.modules()):
            undo = without_input_hooks(self._model, tell=False)
            self._undo.pop_all()
            self._undo = undo

    def close(self) -> None:
        """Bring back what was taken off last."""
        self._undo.close()


def _log(tell: bool, message: str) -> None:
    if tell:
        _LOGGER.info(message)


def _input_hooks(module: nn.Module) -> list[int]:
    return [key for key, hook in forward_hooks(module).items() if _only_requires_gradients(hook)]


def _only_requires_gradients(hook: Callable[..., Any]) -> bool:
    """Tell whether a forward hook makes the output require gradients and does nothing else.

    A function that names nothing but `requires_grad_` can do nothing else; a trial shows what it calls it on.
    """
    code = getattr(hook, "__code__", None)
    if code is None or code.co_names != ("requires_grad_",) or code.co_freevars:
        return False
    output = torch.zeros(1)
    try:
        result = hook(None, (), output)
    except Exception:  # it takes other arguments, or touches the module
        return False
    return output.requires_grad and (result is None or result is output)


def _non_reentrant(function: object) -> Callable[..., Any] | None:
    """Return a checkpoint function that is not re-entrant, None where that cannot be told."""
    if function is checkpoint:
        return functools.partial(checkpoint, use_reentrant=False)
    if not isinstance(function, functools.partial):
        return None
    if function.keywords.get("use_reentrant") is False:
        return function
    if function.func is not checkpoint:
        return None
    return functools.partial(checkpoint, *function.args, **{**function.keywords, "use_reentrant": False})


def _put_back(module: nn.Module, function: object, *, instead_of: object) -> None:
    """Set a module's checkpoint function again, where no other has been set since."""
    if vars(module).get(_FUNCTION) is instead_of:
        setattr(module, _FUNCTION, function)
