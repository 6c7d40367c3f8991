"""Faster LoRA fine-tuning for models compiled with `model.compile(backend="sparselora")`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparse_compile.bank.adapter_bank import AdapterBank
from sparse_compile.calibration.calibrate import calibrate
from sparse_compile.calibration.run import recipe_of
from sparse_compile.compiler.compile import compile  # noqa: A004  (the name that torch has for it)
from sparse_compile.compiler.explain import explain
from sparse_compile.ecosystem.gradient_start import gradient_guided_start
from sparse_compile.ecosystem.merge import merge_masked
from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.options.recipe import Recipe
from sparse_compile.training.roles import token_roles
from sparse_compile.training.schedule import Schedule

if TYPE_CHECKING:
    from sparse_compile.ecosystem.callback import SparseLoRACallback

__all__ = [
    "AdapterBank",
    "Recipe",
    "Schedule",
    "SparseLoRACallback",
    "SparseLoRAConfig",
    "calibrate",
    "compile",
    "explain",
    "gradient_guided_start",
    "merge_masked",
    "recipe_of",
    "token_roles",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("sparse-compile")
    # transformers is optional, and slow to import.
    if name == "SparseLoRACallback":
        from sparse_compile.ecosystem.callback import SparseLoRACallback

        return SparseLoRACallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
