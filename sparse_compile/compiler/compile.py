"""Compile a model in place, with its options checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from sparse_compile.options.config import SparseLoRAConfig

__all__ = ["BACKEND", "compile"]

BACKEND = "sparselora"
"""The name by which TorchDynamo knows the backend."""

_Model = TypeVar("_Model", bound=nn.Module)


def compile(  # noqa: A001  (the name that torch has for it)
    model: _Model,
    options: SparseLoRAConfig | Mapping[str, Any] | None = None,
    *,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    **choices: Any,
) -> _Model:
    """Compile a model in place with the backend `sparselora`, and return it.

    It is `model.compile(backend="sparselora", options=...)`, but a wrong option is an error here, not at the first
    training step.

    Args:
        model: The model, with its adapters. It is changed in place, and keeps its class, its weights and its methods.
        options: The options, as a dict or a `SparseLoRAConfig`; None for the defaults (preset `"o1"`), or where they
            are given by keyword.
        fullgraph: As of `torch.compile`: whether a break of the graph is an error.
        dynamic: As of `torch.compile`: whether sizes are symbols from the first graph on; None decides by what changes.
        **choices: The options by keyword, such as `preset="o2"`: the fields of `SparseLoRAConfig`.

    Returns:
        The model that was given.

    Raises:
        ValueError: An unknown or wrong option, options given in both ways, or something else than a module.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"compile takes an nn.Module, got {type(model).__name__}; a function is compiled by "
            f"torch.compile(function, backend={BACKEND!r}, options=...)"
        )
    if options is not None and choices:
        raise ValueError(f"options are given once: put {', '.join(choices)} into options, or give all by keyword")
    given = choices if options is None else options
    config = given if isinstance(given, SparseLoRAConfig) else SparseLoRAConfig.from_options(given)
    model.compile(backend=BACKEND, options=config.to_options(), fullgraph=fullgraph, dynamic=dynamic)
    return model
