"""Let TorchDynamo trace PEFT's DoRA layers: without it, one decoder block with four adapters is 18 graphs.

PEFT's DoRA layer asks a helper for its frozen weight, dequantised where it is quantised. The helper looks at the module
name of the weight's class, which Dynamo cannot trace, so the whole layer falls back to eager. What is traced in its
place here returns a weight that is not quantised, as the helper would, and leaves every other weight to the helper.

The substitution holds for the whole process, whichever backend compiles: it changes what Dynamo traces, never what the
helper does when it is called.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

_LOG = logging.getLogger(__name__)
_HELPER = "dequantize_module_weight"
_substituted: set[Callable[..., Any]] = set()


def make_dora_traceable() -> bool:
    """Have Dynamo trace a substitute for PEFT's weight-dequantisation helper; return whether it does from now on.

    Does nothing where PEFT has not been imported, or has no helper of this name and signature. May be called again.
    """
    integrations = sys.modules.get("peft.utils.integrations")
    helper = getattr(integrations, _HELPER, None)
    if not isinstance(helper, FunctionType):
        _LOG.debug("PEFT is not imported, or has no %s: DoRA layers are traced as they are", _HELPER)
        return False
    if helper in _substituted:
        return True
    parameters = list(inspect.signature(helper).parameters.values())
    if [each.name for each in parameters] != ["module"] or parameters[0].default is not inspect.Parameter.empty:
        _LOG.debug("PEFT's %s takes %s: DoRA layers are traced as they are", _HELPER, inspect.signature(helper))
        return False
    try:
        torch.compiler.substitute_in_graph(helper)(_substitute_for(helper))
    except (TypeError, ValueError) as error:  # someone else has substituted it
        _LOG.debug("PEFT's %s cannot be substituted: %s", _HELPER, error)
        return False
    _substituted.add(helper)
    return True


def _substitute_for(helper: Callable[..., Any]) -> Callable[..., Any]:
    # Untraced: a call of the helper itself would be substituted again, without end.
    as_peft_does = torch.compiler.disable(helper, reason="PEFT dequantises a quantised weight")

    def dequantize_module_weight(module: nn.Module) -> Any:
        # Exact types: each kind of quantised or sharded weight is a class of its own. HQQ keeps its bytes in `W_q`.
        if hasattr(module, "W_q"):
            return as_peft_does(module)
        weight = module.weight
        if type(weight) is nn.Parameter or type(weight) is Tensor:
            return weight
        return as_peft_does(module)

    return dequantize_module_weight
