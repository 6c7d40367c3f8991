"""Fit the maps of a run to its dense steps, and keep a step dense that has none to compute with.

Maps are buffers of the compiled graph. In a dense step the graph hands on what each block reads and returns of context
tokens. When the optimizer has stepped, the maps are fitted to that, in place: nothing is compiled.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from typing import Any, Final

from sparse_compile.compiler.outputs import CompiledGraph
from sparse_compile.compiler.weight_watch import StoredWeight
from sparse_compile.kernels.observed_rows import observing
from sparse_compile.passes.context import PassContext
from sparse_compile.predictor.weight_state import WeightWatch
from sparse_compile.surrogates.moments import NonFiniteActivation
from sparse_compile.surrogates.online import OnlineMap
from sparse_compile.torch_private.autograd import running_backward
from sparse_compile.training.news import say
from sparse_compile.training.schedule import DENSE
from sparse_compile.training.session import Session

__all__ = ["with_fitted_maps"]

_UNFITTED: Final = "maps that are not fitted"
_STALE: Final = "maps of other weights"
"""Why a session is held dense."""


def with_fitted_maps(compiled: CompiledGraph, ctx: PassContext, session: Session, *, moves: bool) -> CompiledGraph:
    """Have the maps of a graph fitted where the run fits them, and its steps dense while a map is of no use.

    Args:
        compiled: a compiled training graph.
        ctx: its facts.
        session: of its model.
        moves: whether weights change their address from step to step, as FSDP2's do.
    """
    mapped = [plan for plan in ctx.facts.plan.sparse_sites if plan.mapped]
    if not mapped:
        return compiled
    weights = {
        plan.site.name: [tensor for each in plan.site.projections for tensor in StoredWeight.of(each, ctx).tensors()]
        for plan in mapped
    }
    online = {}
    for plan in mapped:
        if plan.online:
            buffers, known = ctx.facts.surrogates[plan.site.identity], session.online_maps.get(plan.site.identity)
            if known is None or known.surrogate is not buffers:
                known = OnlineMap(buffers, fitted=bool(buffers.q.any()))
                session.online_maps[plan.site.identity] = known
            online[ctx.observed_as(plan.site)] = known
    fixed = ctx.facts.slots is not None
    return _Maps(compiled, session, WeightWatch(weights, moves=moves), online, fixed=fixed)


class _Maps:
    """A compiled graph with maps: what is called in its place.

    Args:
        compiled: the graph.
        session: of its model.
        watch: the weights of the mapped sites, by site name.
        online: by the key that their rows come under, the maps that the run fits.
        fixed: whether the graph is for one phase alone.
    """

    def __init__(
        self,
        compiled: CompiledGraph,
        session: Session,
        watch: WeightWatch,
        online: Mapping[str, OnlineMap],
        *,
        fixed: bool,
    ) -> None:
        self.compiled = compiled
        self.session = session
        self.watch = watch
        self.online = online
        self.fixed = fixed
        session.call_between_steps(self._fit)
        if not self.usable:
            session.hold_dense(_UNFITTED)

    @property
    def usable(self) -> bool:
        """Whether each map that the run fits is fitted."""
        return all(each.fitted for each in self.online.values())

    def __call__(self, *args: Any) -> Any:
        """Run the graph."""
        if running_backward() is not None:
            return self.compiled(*args)  # a recomputation reads what its forward did
        if changed := self.watch.changed():
            was_sparse = self.session.phase != DENSE
            self._start_anew(sorted(changed))
            if self.fixed and was_sparse:
                raise RuntimeError(
                    f"sparselora: the frozen weights of {min(changed)} changed between the optimizer's step and this "
                    "forward, whose graph has room for a sparse step alone. Take the step again: it will be dense."
                )
        if self.session.phase != DENSE:
            return self.compiled(*args)
        with observing({key: self._collector(each) for key, each in self.online.items()}):
            return self.compiled(*args)

    def _fit(self) -> None:
        """Fit what tokens have come for, where the next step would be sparse: until then more tokens may come."""
        waiting = [each for each in self.online.values() if each.pending]
        first = not self.usable
        if not self.session.due:
            return
        if not waiting or not all(each.ready for each in waiting):
            if first and self.session.once("maps wait"):
                say("steps stay dense until there are context tokens enough of dense steps to fit maps to")
            return
        start = time.perf_counter()
        for each in waiting:
            each.fit()
        if first and self.usable:
            tokens = min(each.tokens for each in self.online.values())
            errors = sorted(each.error for each in self.online.values())
            say(
                f"{len(self.online)} maps were fitted to {tokens:.0f} context tokens of the dense steps, in "
                f"{time.perf_counter() - start:.1f} s; errors {errors[0]:.2f} to {errors[-1]:.2f} of a constant's"
            )
        if all(each.fitted for each in self.session.online_maps.values()):
            self.session.release(_UNFITTED)  # other graphs of the model may have maps of their own

    def _collector(self, online: OnlineMap) -> Any:
        def collect(x: Any, y: Any) -> None:
            try:
                online.collect(x, y)
            except NonFiniteActivation:
                if self.session.once("activations that are not finite"):
                    warnings.warn(
                        "sparselora: activations of context tokens hold NaN or infinity. No map is fitted to them.",
                        stacklevel=2,
                    )

        return collect

    def _start_anew(self, changed: list[str]) -> None:
        """Keep steps dense whose maps are of other weights."""
        if self.online:
            for each in self.online.values():
                each.forget()
                each.fitted = False
            self.session.hold_dense(_UNFITTED)
            say(
                f"the frozen weights of {changed[0]} changed: steps are dense until the maps are fitted to the new ones"
            )
            return
        self.session.hold_dense(_STALE)
        if self.session.once(_STALE):
            warnings.warn(
                f"sparselora: the frozen weights of {changed[0]} changed, and the recipe's maps are of the old ones: "
                "training goes on dense. Calibrate again, or give dense_every=8 to have the maps fitted in the run.",
                stacklevel=2,
            )
