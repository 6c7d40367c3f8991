"""Tell which part of a model a captured graph computes: its name in the whole model, and its place among its like.

TorchDynamo captures the forward of one module. That is the whole model, or a part of it where the graph breaks, or
where the blocks are compiled one by one (FSDP2 gathers the weights of a block between two graphs). Sources of a part's
parameters begin at the part: every block would have a site named `mlp`, the first of one. Two facts say where it is:
the module that the frame being compiled belongs to, and the modules whose calls stand on the Python stack meanwhile,
the outermost of which is the model.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from torch import fx, nn
from torch.nn.parallel import DistributedDataParallel

from sparse_compile.torch_private.dynamo import frame_locals, root_name, source_of
from sparse_compile.torch_private.modules import WRAPPER_NAMES

__all__ = ["ModelPart", "part_of"]

_MODELS: Final[weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]]] = weakref.WeakKeyDictionary()
"""Part to the model it was last called by: a checkpoint's recomputation calls the part alone."""


@dataclass(frozen=True, eq=False)
class ModelPart:
    """The module whose forward a graph was captured from.

    Attributes:
        model: the outermost module that was being called, which holds the part.
        path: dotted path of the part in the model; empty where it is the model.
        position: order of the part in its stack, from 0: among the modules of its class whose paths differ from its own
            in one place, as those of the blocks of a decoder do.
        count: size of the stack.
    """

    model: nn.Module
    path: str
    position: int
    count: int


def part_of(gm: fx.GraphModule) -> ModelPart | None:
    """Return the part of a model that a graph was captured from, to be called while TorchDynamo compiles it.

    Returns None where the graph's parameters are not reached through one module: a function that closes over modules.
    """
    scope = frame_locals()
    names = {root_name(source_of(node)) for node in gm.graph.nodes if node.op == "placeholder"}
    modules = {id(value): value for name in names if isinstance(value := _at(scope, name), nn.Module)}
    if len(modules) != 1:
        return None
    (module,) = modules.values()
    model = _model_of(module)
    path = next(name for name, each in model.named_modules(remove_duplicate=False) if each is module)
    stack = _stack(model, module, path)
    shown = ".".join(part for part in path.split(".") if part not in WRAPPER_NAMES)
    return ModelPart(model, shown, stack.index(path), len(stack))


def _at(scope: Mapping[str, object], name: str | None) -> object:
    return None if name is None else scope.get(name)


def _model_of(part: nn.Module) -> nn.Module:
    """Return the outermost module on the Python stack that holds `part`."""
    called: list[nn.Module] = []
    frame = inspect.currentframe()
    while frame is not None:
        # Of other frames nothing is read: their locals would be copied, and held until they return.
        if frame.f_code is nn.Module.__call__.__code__:
            module = frame.f_locals["self"]
            if not isinstance(module, DistributedDataParallel):  # nobody counts the wrapper in a module's path
                called.append(module)
        frame = frame.f_back
    model = next((module for module in reversed(called) if any(each is part for each in module.modules())), None)
    if model is None or model is part:
        known = _MODELS.get(part)
        # By identity: a module that holds others may have a length, and be false.
        other = known() if known is not None and called in ([], [part]) else None
        return part if other is None else other
    _MODELS[part] = weakref.ref(model)
    return model


def _stack(model: nn.Module, part: nn.Module, path: str) -> Sequence[str]:
    """Return the paths of the stack that `part` stands in, in the model's order: its own, and those of its like."""
    if not path:
        return [path]
    parts = path.split(".")
    alike: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        other = name.split(".")
        if type(module) is not type(part) or len(other) != len(parts):
            continue
        places = [place for place, (a, b) in enumerate(zip(parts, other, strict=True)) if a != b]
        if len(places) == 1:
            alike.setdefault(places[0], []).append(name)
    # The decoder of a translation model has an encoder beside it, whose blocks differ in another place.
    largest = max(alike.values(), key=len, default=[])
    members = {path, *largest}
    return [name for name, _ in model.named_modules(remove_duplicate=False) if name in members]
