"""Fit the maps of a run to its dense steps, and keep a step dense that has none to compute with.

Maps are buffers of the compiled graph. In a dense step the graph hands on what each block reads and returns of context
tokens. When the optimizer has stepped, the maps are fitted to that, in place: nothing is compiled.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Final

from sparse_compile.compiler.outputs import CompiledGraph
from sparse_compile.compiler.weight_watch import StoredWeight
from sparse_compile.graph.facts import SitePlan
from sparse_compile.graph.sites import Projection
from sparse_compile.kernels.observed_rows import observing
from sparse_compile.options.recipe import AffineMap
from sparse_compile.passes.context import PassContext
from sparse_compile.predictor.weight_state import WeightWatch, fingerprint
from sparse_compile.surrogates.moments import NonFiniteActivation
from sparse_compile.surrogates.online import OnlineMap
from sparse_compile.torch_private.autograd import running_backward
from sparse_compile.training.news import say
from sparse_compile.training.schedule import DENSE
from sparse_compile.training.session import Session

_LOG = logging.getLogger(__name__)

__all__ = ["held_for_maps", "maps_are_stale", "with_fitted_maps"]

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
    mapped = ctx.facts.plan.mapped_sites
    if not mapped:
        return compiled
    stored = {plan.site.name: [StoredWeight.of(each, ctx) for each in _imitated(plan, ctx)] for plan in mapped}
    weights = {name: [tensor for each in found for tensor in each.tensors()] for name, found in stored.items()}
    online = {}
    for plan in mapped:
        if plan.online:
            buffers, known = ctx.facts.surrogates[plan.site.identity], session.online_maps.get(plan.site.identity)
            if known is None or known.surrogate is not buffers:
                known = OnlineMap(
                    buffers,
                    fitted=known is None and _is_set(buffers),
                    left_at=_exit(ctx) if plan.left else "",
                    weights=partial(_fingerprint, stored[plan.site.name]),
                )
                session.online_maps[plan.site.identity] = known
            online[ctx.observed_as(plan.site)] = known
    watch = WeightWatch(weights, moves=moves)
    if online:
        # One for all graphs: what one of them has seen is news to no other, and none starts with what nobody saw.
        key = tuple((plan.site.identity, len(weights[plan.site.name])) for plan in mapped)
        watch = session.map_watches.setdefault(key, watch)
        watch.follow(weights)
    return _Maps(compiled, session, watch, online, fixed=ctx.facts.slots is not None)


def _imitated(plan: SitePlan, ctx: PassContext) -> list[Projection]:
    """Return the frozen layers whose function a map stands for: of its block, or of all since the exit of context."""
    sites = [plan.site]
    if plan.left:
        left = [each.site for each in ctx.facts.plan.sites if each.left]
        sites = left[: left.index(plan.site)]
    return [projection for site in sites for projection in site.projections]


def _exit(ctx: PassContext) -> str:
    """Return the name of the attention block before which context leaves."""
    return next(each.site.name for each in ctx.facts.plan.sites if each.left and each.site.kind == "attention")


def _fingerprint(weights: Iterable[StoredWeight]) -> str:
    """Return what tells the weights that a map stands for from others, as a recipe has it."""
    return fingerprint(each.dense() for each in weights)


def held_for_maps(ctx: PassContext, session: Session) -> bool:
    """Have a step be dense that was to be sparse, if a map of a graph that is not compiled yet has no fit.

    Returns:
        Whether the step is another one now.
    """
    before = session.phase
    for plan in ctx.facts.plan.mapped_sites:
        if plan.online:
            buffers, known = ctx.facts.surrogates[plan.site.identity], session.online_maps.get(plan.site.identity)
            is_fitted = _is_set(buffers) if known is None else known.surrogate is buffers and known.fitted
            if not is_fitted:
                session.hold_dense(_UNFITTED)
    return session.phase != before  # within a backward it stays what it was


def maps_are_stale(session: Session) -> bool:
    """Tell whether the weights of a model are known to have changed under a recipe's maps."""
    return session.holds(_STALE)


def _is_set(surrogate: AffineMap) -> bool:
    """Tell a map from the zeros that stand for one until the run has fitted it."""
    return any(bool(part.any()) for part in (surrogate.q, surrogate.u, surrogate.bias))


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
        session.call_between_steps(self._fit_if_due)
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
        was_sparse = self.session.phase != DENSE
        if changed := self.watch.changed():
            self._start_anew(sorted(changed))
        if was_sparse and not self.usable:
            self.session.hold_dense(_UNFITTED)  # other graphs of the model may have been content
        if self.fixed and was_sparse and self.session.phase == DENSE:
            why = f"the frozen weights of {min(changed)} changed" if changed else "maps are not fitted yet"
            raise RuntimeError(
                f"sparselora: {why}, which was found out in a forward whose graph has room for a sparse step alone. "
                "Take the step again: it will be dense."
            )
        if self.session.phase != DENSE or self._over:
            return self.compiled(*args)
        with observing({key: self._collector(each) for key, each in self.online.items()}):
            return self.compiled(*args)

    def _fit_if_due(self) -> None:
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
            self._fit_one(each)
        seconds = time.perf_counter() - start
        tokens = min(each.tokens for each in self.online.values())
        errors = sorted(each.error for each in self.online.values())
        span = f"{errors[0]:.2f} to {errors[-1]:.2f} of a constant's"
        if first and self.usable:
            say(
                f"{len(self.online)} maps were fitted to {tokens:.0f} context tokens of the dense steps, in "
                f"{seconds:.1f} s; errors {span}"
            )
        elif not first:
            self.session.note_renewal()
            # The tokens of this dense step are none that the maps had seen: this is how far they had drifted.
            step = self.session.schedule.step
            _LOG.info("sparselora: step %d: maps had errors %s, fitted anew in %.2f s", step, span, seconds)
        if all(each.fitted for each in self.session.online_maps.values()):
            self.session.release(_UNFITTED)  # other graphs of the model may have maps of their own

    def _fit_one(self, online: OnlineMap) -> None:
        """Fit a map; where its tokens give none, say so once and keep what there is."""
        try:
            online.fit()
        except (ValueError, RuntimeError) as error:  # a decomposition that does not converge is a RuntimeError
            online.pending = False
            if self.session.once("tokens that give no map"):
                kept = "The one before stays in use" if online.fitted else "Steps stay dense"
                warnings.warn(f"sparselora: no map could be fitted to the last tokens: {error}. {kept}.", stacklevel=2)

    @property
    def _over(self) -> bool:
        """Whether no step will be sparse any more: then no tokens are wanted."""
        window = self.session.window
        return window is not None and window[1] is not None and self.session.schedule.step >= window[1]

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
