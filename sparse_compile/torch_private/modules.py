"""What `torch.compile` hangs on a module, and `torch.nn` keeps in private."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final

import torch
from torch import nn

WRAPPER_NAMES: Final = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})
"""Names that `torch.compile` and checkpoint wrappers put into a module's path, which no user knows."""


def backend_name(module: nn.Module | Callable[..., Any]) -> str | None:
    """Return the name of the backend that a module or a function was compiled for, in place or wrapped; None if eager.

    Returns None as well where the name cannot be told: nothing may rest on a module's being eager.
    """
    name = getattr(_backend(module), "compiler_name", None)
    return name if isinstance(name, str) else None


def backend_options(module: nn.Module | Callable[..., Any]) -> Mapping[str, Any] | None:
    """Return the `options` that a module or a function was compiled with, empty where it was compiled without.

    Returns None for what is eager, and where the options cannot be told.
    """
    given = getattr(_backend(module), "kwargs", None)
    return dict(given.get("options") or {}) if isinstance(given, Mapping) else None


def _backend(module: nn.Module | Callable[..., Any]) -> Any:
    """Return what holds the name and the options of the backend that a module was compiled for."""
    compiled: Any = module if inspect.isfunction(module) else getattr(module, "_compiled_call_impl", None)
    compiled = getattr(compiled, "compiled", compiled)  # behind `around_compiled_calls`
    context = getattr(module, "dynamo_ctx", None)
    if inspect.isfunction(compiled):
        context = inspect.getclosurevars(compiled).nonlocals.get("self")
    backend: Any = getattr(context, "callback", None)
    # The compiler stands inside wrappers of Dynamo's own, each of which holds the next.
    while hasattr(backend, "_torchdynamo_orig_backend"):
        backend = backend._torchdynamo_orig_backend
    return backend


@contextmanager
def around_compiled_calls(
    module: nn.Module, around: Callable[[tuple[Any, ...], dict[str, Any]], AbstractContextManager[None]]
) -> Iterator[None]:
    """Enter a context manager around each call of a compiled module, before Dynamo looks at its guards.

    A hook of the module would be part of what Dynamo traces, and come behind the guards.

    Args:
        module: compiled in place, or what `torch.compile` returned; any other is left alone.
        around: takes the arguments of the call.
    """
    compiled = getattr(module, "_compiled_call_impl", None)
    if compiled is not None:

        def call(*args: Any, **kwargs: Any) -> Any:
            with around(args, kwargs):
                return compiled(*args, **kwargs)

        call.compiled = compiled  # type: ignore[attr-defined]
        module._compiled_call_impl = call
        try:
            yield
        finally:
            if getattr(module, "_compiled_call_impl", None) is call:
                module._compiled_call_impl = compiled
    elif "forward" in vars(module) and hasattr(module, "_orig_mod"):
        forward = module.forward

        def wrapped_forward(*args: Any, **kwargs: Any) -> Any:
            with around(args, kwargs):
                return forward(*args, **kwargs)

        module.__dict__["forward"] = wrapped_forward
        try:
            yield
        finally:
            module.__dict__["forward"] = forward
    else:
        yield


def compiled_call(module: nn.Module, backend: Callable[..., Any]) -> Callable[..., Any]:
    """Return what a module would call, had it been compiled in place for a backend: see `calling`."""
    return torch.compile(module._call_impl, backend=backend)


@contextmanager
def calling(module: nn.Module, call: Callable[..., Any]) -> Iterator[None]:
    """Have a module call this, as one that was compiled in place calls its compiled code.

    No wrapper stands around the module, which it would be known by from then on.
    """
    before = module._compiled_call_impl
    module._compiled_call_impl = call
    try:
        yield
    finally:
        module._compiled_call_impl = before


@contextmanager
def uncompiled(module: object) -> Iterator[None]:
    """Have a module that was compiled in place run its own code."""
    compiled = getattr(module, "_compiled_call_impl", None)
    if compiled is None:
        yield
        return
    module._compiled_call_impl = None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module._compiled_call_impl = compiled  # type: ignore[attr-defined]


def original_module(module: nn.Module) -> nn.Module:
    """Return what `torch.compile` wrapped, or the module itself where it wrapped nothing."""
    original: nn.Module = getattr(module, "_orig_mod", module)
    return original


def forward_hooks(module: nn.Module) -> dict[int, Callable[..., Any]]:
    """Return the forward hooks of a module by the number that their handles know them by; a change takes effect."""
    return module._forward_hooks
