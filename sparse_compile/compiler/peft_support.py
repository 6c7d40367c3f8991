"""Find PEFT's layers, and let TorchDynamo trace those of DoRA.

Without that, one decoder block with four such adapters is 18 graphs. PEFT's DoRA layer asks two helpers for its frozen
weight: one dequantises it where it is quantised, the other transposes it where it is stored as (in, out). The first
looks at the module name of the weight's class, the second constructs an `nn.Parameter`; Dynamo traces neither, so the
whole layer falls back to eager. What is traced in their place here gives the same values and gradients for plain
weights and for those that bitsandbytes holds in 4 bits, and leaves every other weight to PEFT.

The substitution holds for the whole process, whichever backend compiles: it changes what Dynamo traces, never what the
helpers do when they are called.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_LOG = logging.getLogger(__name__)
_substituted: set[Callable[..., Any]] = set()


def make_dora_traceable() -> bool:
    """Have Dynamo trace substitutes for PEFT's weight helpers; return whether it does from now on.

    Where PEFT has not been imported, it is left so, and Dynamo traces them from the moment that it is. A helper that is
    missing, or has another signature, is left alone. May be called again.
    """
    if "peft" not in sys.modules:
        if _AFTER_PEFT not in sys.meta_path:
            sys.meta_path.insert(0, _AFTER_PEFT)
        return False
    done = [_substitute(module, name, make) for module, name, make in _HELPERS]
    return all(done)


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """Return PEFT's layers with LoRA adapters by name; none where PEFT is not installed."""
    try:
        from peft.tuners.lora import LoraLayer
    except ImportError:
        return {}
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def are_disabled(model: nn.Module) -> bool:
    """Tell whether PEFT's adapters of a model are switched off (`disable_adapter`), which a caller does on purpose."""
    return any(layer.disable_adapters for layer in lora_layers(model).values())


def _substitute(module: str, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> bool:
    helper = getattr(sys.modules.get(module), name, None)
    if not isinstance(helper, FunctionType):
        _LOG.debug("PEFT has no function %s.%s: DoRA layers are traced without it", module, name)
        return False
    if helper in _substituted:
        return True
    substitute = make(helper)
    expected, found = (
        [(each.name, each.default) for each in inspect.signature(function).parameters.values()]
        for function in (substitute, helper)
    )
    if expected != found:
        _LOG.debug("PEFT's %s takes %s: DoRA layers are traced as they are", name, inspect.signature(helper))
        return False
    try:
        torch.compiler.substitute_in_graph(helper)(substitute)
    except (TypeError, ValueError) as error:  # someone else has substituted it
        _LOG.debug("PEFT's %s cannot be substituted: %s", name, error)
        return False
    _substituted.add(helper)
    return True


def _dequantisation(helper: Callable[..., Any]) -> Callable[..., Any]:
    # Untraced: a call of the helper itself would be substituted again, without end.
    as_peft_does: Callable[..., Any] = torch.compiler.disable(helper)  # type: ignore[no-untyped-call]
    # PEFT has imported it where it is installed.
    bitsandbytes = sys.modules.get("bitsandbytes")
    four_bit = () if bitsandbytes is None else bitsandbytes.nn.Params4bit
    dequantized: Callable[..., Any] = as_peft_does if bitsandbytes is None else bitsandbytes.functional.dequantize_4bit

    def dequantize_module_weight(module: nn.Module) -> Any:
        # Exact types: each kind of quantised or sharded weight is a class of its own. HQQ keeps its bytes in `W_q`.
        if hasattr(module, "W_q"):
            return as_peft_does(module)
        weight = module.weight
        if type(weight) is nn.Parameter or type(weight) is Tensor:
            return weight
        if isinstance(weight, four_bit):
            return dequantized(weight.data, weight.quant_state)
        return as_peft_does(module)

    return dequantize_module_weight


def _transposition(_: Callable[..., Any]) -> Callable[..., Any]:
    def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
        if not fan_in_fan_out:
            return weight
        # PEFT makes a parameter of its own of a parameter: no gradient flows back to the weight.
        return weight.detach().T if isinstance(weight, nn.Parameter) else weight.T

    return transpose


_HELPERS = (
    ("peft.utils.integrations", "dequantize_module_weight", _dequantisation),
    ("peft.utils.other", "transpose", _transposition),
)


class _AfterPeft:
    """Finds PEFT where others find it, and has Dynamo trace the substitutes once PEFT has been executed.

    Not one helper after the other: PEFT imports bitsandbytes later than the module of the first.
    """

    def __init__(self) -> None:
        self._searching = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "peft" or self._searching:
            return None
        self._searching = True  # another finder may ask all finders in its turn
        try:
            return self._watched(name, path, target)
        finally:
            self._searching = False

    def _watched(self, name: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
        for finder in tuple(sys.meta_path):
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find(name, path, target) if find is not None and finder is not self else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    self._watch(spec.loader)
                return spec
        return None

    def _watch(self, loader: Any) -> None:
        """Have a loader, which loads this module alone, call back once it has executed it.

        The loader stays what it is: whoever looks for sources or reloads the module asks it.
        """
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            del loader.exec_module
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            make_dora_traceable()

        loader.exec_module = exec_module


_AFTER_PEFT: Any = _AfterPeft()
