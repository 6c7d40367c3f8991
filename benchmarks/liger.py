"""Liger-Kernel as a peer, where it is installed: PEFT's model with Liger's norms, gated units, loss and rotations.

Liger replaces some functions of transformers' module for every model of the process. Arms are measured in turns, so
these replacements are in force during the forward of this arm alone.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from torch import nn

LIGER = "liger"
"""Name of the arm."""


def liger_missing() -> str | None:
    """Say why there is no such arm here, or return None where there is."""
    return None if importlib.util.find_spec("liger_kernel") else "not installed"


def with_liger(model: nn.Module) -> nn.Module:
    """Have Liger's kernels compute a PEFT model of a Llama; return it."""
    modeling = importlib.import_module("transformers.models.llama.modeling_llama")
    before = dict(vars(modeling))
    importlib.import_module("liger_kernel.transformers").apply_liger_kernel_to_llama(model=model.base_model.model)
    replaced = {name: value for name, value in vars(modeling).items() if before.get(name) is not value}
    originals = {name: before[name] for name in replaced}
    vars(modeling).update(originals)
    forward = model.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        vars(modeling).update(replaced)
        try:
            return forward(*args, **kwargs)
        finally:
            vars(modeling).update(originals)

    model.forward = run
    return model
