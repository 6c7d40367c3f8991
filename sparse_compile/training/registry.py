"""Know whose a trained parameter is, and report the optimizer steps of its owner.

A compiled graph, the trainer's callback and an optimizer all see the trained parameters of a model, and have nothing
else in common. Parameters are held weakly, so that a dead model leaves nothing behind, and a copy of a model is another
model.

FSDP2 (`fully_shard`) gathers the parameters of a block before its forward and its backward, and puts the shards back
afterwards. So graphs are captured with gathered parameters, and an optimizer holds shards: no parameter is common to
both. The model is: it is remembered too, and between two steps its parameters are the shards.
"""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Final, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparse_compile.training.schedule import STATE_LOCK

__all__ = ["Registry", "was_skipped"]

T = TypeVar("T")


class Registry(Generic[T]):
    """The owners of parameters. Every method is to be called with `STATE_LOCK` held, apart from `watch_optimizers`.

    Args:
        on_last_death: called with an owner whose last parameter has died; `STATE_LOCK` is held.
        on_step: called after an optimizer step that changed parameters, with their owners; `STATE_LOCK` is held.
    """

    def __init__(self, on_last_death: Callable[[T], None], on_step: Callable[[list[T]], None]) -> None:
        self._on_last_death: Final = on_last_death
        self._on_step: Final = on_step
        # By id: the step hook looks up every parameter of every optimizer. An id is not used again before the
        # reference's callback has removed it here.
        self._owners: dict[int, tuple[weakref.ref[Tensor], T]] = {}
        self._parameters: dict[T, set[int]] = {}
        self._models: weakref.WeakKeyDictionary[nn.Module, T] = weakref.WeakKeyDictionary()
        self._is_watching = False

    def owners_of(self, parameters: Iterable[Tensor]) -> list[T]:
        """Return the owners of parameters, each once; parameters of nobody are left out."""
        return list(dict.fromkeys(owner for each in parameters if (owner := self._owner(each)) is not None))

    def owners_of_model(self, model: nn.Module) -> list[T]:
        """Return the owners remembered for a model, a model around it, or a part of it."""
        if model in self._models:
            return [self._models[model]]
        modules = set(model.modules())
        return [owner for known, owner in self._models.items() if known in modules or model in set(known.modules())]

    def living(self) -> list[T]:
        """Return every owner that has a parameter, in the order in which they got their first."""
        return list(self._parameters)

    def count(self, owner: T) -> int:
        """Return the number of living parameters of an owner."""
        return len(self._parameters.get(owner, ()))

    def give(self, owner: T, parameters: Iterable[Tensor]) -> None:
        """Make those of these parameters that have no owner the property of this one."""
        for parameter in parameters:
            if self._owner(parameter) is None:
                key = id(parameter)
                self._owners[key] = (weakref.ref(parameter, partial(self._forget, key)), owner)
                self._parameters.setdefault(owner, set()).add(key)

    def remember_model(self, model: nn.Module, owner: T) -> None:
        """Note whose a sharded model is, for as long as the model lives: what it holds at a step is the owner's."""
        self._models[model] = owner

    def hand_over(self, old: T, new: T) -> None:
        """Make everything of one owner the property of another."""
        for key in (keys := self._parameters.pop(old, set())):
            self._owners[key] = (self._owners[key][0], new)
        if keys:
            self._parameters.setdefault(new, set()).update(keys)
        for model in [model for model, owner in self._models.items() if owner is old]:
            self._models[model] = new

    def watch_optimizers(self) -> None:
        """Have torch report every optimizer step from now on. Nothing is hooked before this is first called."""
        with STATE_LOCK:
            if not self._is_watching:
                self._is_watching = True
                register_optimizer_step_post_hook(self.after_optimizer_step)
                atexit.register(self._let_go)

    # Dynamo traces step hooks along with a compiled optimizer step: keep it out of this bookkeeping.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def after_optimizer_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Report a step to the owners of what the optimizer holds; torch calls it after each step."""
        with STATE_LOCK:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            self._give_shards([parameter for parameter in parameters if self._owner(parameter) is None])
            owners = self.owners_of(parameters)
            if owners and not was_skipped(optimizer):
                self._on_step(owners)

    def _owner(self, parameter: Tensor) -> T | None:
        entry = self._owners.get(id(parameter))
        return entry[1] if entry is not None and entry[0]() is parameter else None

    def _give_shards(self, strangers: list[Tensor]) -> None:
        """Find the owners of shards by the models that hold them."""
        wanted = {id(parameter) for parameter in strangers}
        if wanted:
            for model, owner in list(self._models.items()):
                self.give(owner, [parameter for parameter in model.parameters() if id(parameter) in wanted])

    def _let_go(self) -> None:
        """Hear of no more deaths: what `_forget` needs is taken down, module by module, when the interpreter exits."""
        self._owners.clear()
        self._parameters.clear()

    def _forget(self, key: int, reference: weakref.ref[Tensor]) -> None:
        """Drop a dead parameter."""
        with STATE_LOCK:
            entry = self._owners.get(key)
            if entry is None or entry[0] is not reference:
                return
            del self._owners[key]
            owner = entry[1]
            self._parameters[owner].discard(key)
            if not self._parameters[owner]:
                del self._parameters[owner]
                self._on_last_death(owner)


def was_skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Say whether a gradient scaler had this optimizer skip the update.

    For most optimizers the scaler does not call `step` at all. A fused one is called all the same and finds `found_inf`
    on itself, for the duration of the call. Reading it waits for the device, as the scaler does for all the others.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    return isinstance(found_inf, Tensor) and bool(found_inf)
