"""Keep a predictor's factors those of the weights that there are, where weights change between steps.

Factors are buffers of the compiled graph. Where a weight holds other values than they were computed from (a checkpoint
that is loaded in place, an adapter that is merged into its base), they are computed again and written in place before
the next sparse step: nothing is compiled.
"""

from __future__ import annotations

import time
import warnings
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparse_compile.compiler.outputs import CompiledGraph
from sparse_compile.graph.sites import Projection
from sparse_compile.passes.context import PassContext
from sparse_compile.passes.quantized_weight import QuantizedWeight
from sparse_compile.passes.roles.plan_sparsity import factors_of
from sparse_compile.predictor.store import FactorStore
from sparse_compile.predictor.svd import LowRankFactors
from sparse_compile.predictor.weight_state import WeightWatch
from sparse_compile.torch_private.autograd import running_backward
from sparse_compile.training.news import say
from sparse_compile.training.schedule import DENSE
from sparse_compile.training.session import Session


@dataclass(frozen=True)
class StoredWeight:
    """The weight of a frozen layer as it is stored, not kept alive.

    Attributes:
        references: to the parameter, or to the packed data and the scales of one in 4 bits.
        form: how one in 4 bits is dequantised, without its values; None for a parameter.
    """

    references: tuple[weakref.ref[Tensor] | None, ...]
    form: QuantizedWeight | None = None

    @classmethod
    def of(cls, projection: Projection, ctx: PassContext) -> StoredWeight:
        """Return the weight of a layer."""
        quantized = ctx.facts.quantized_weights.get(projection.weight)
        if quantized is None:
            value = ctx.env.parameters[projection.weight].value
            assert value is not None, "a layer without its weight at hand is no projection"
            return cls((weakref.ref(value),))
        references = tuple(None if value is None else weakref.ref(value) for value in quantized.values)
        return cls(references, replace(quantized, values=()))

    def tensors(self) -> list[Tensor]:
        """Return the tensors that hold it; none once the model is gone."""
        found = [None if reference is None else reference() for reference in self.references]
        return [tensor for tensor in found if tensor is not None]

    def dense(self) -> Tensor:
        """Return it as it is stored, (out, in) or transposed; dequantised, a fresh tensor."""
        values = tuple(None if reference is None else reference() for reference in self.references)
        if self.form is not None:
            return replace(self.form, values=values).dense()
        assert values[0] is not None, "a graph runs with the weights that it was compiled for"
        return values[0].detach()


@dataclass(frozen=True)
class _Predicted:
    """A layer whose output is predicted: its weight and the buffers of the graph that hold its factors."""

    projection: Projection
    weight: StoredWeight
    factors: LowRankFactors


def with_fresh_factors(compiled: CompiledGraph, ctx: PassContext, session: Session, *, moves: bool) -> CompiledGraph:
    """Look at the weights before each sparse step of a compiled graph, and renew the factors of those that changed.

    Args:
        compiled: a compiled training graph.
        ctx: its facts.
        session: of its model.
        moves: whether weights change their address from step to step, as FSDP2's do.
    """
    projections = {each.name: each for plan in ctx.facts.plan.predicted_sites for each in plan.site.predicted}
    layers = {
        name: _Predicted(each, StoredWeight.of(each, ctx), ctx.facts.factors[name])
        for name, each in projections.items()
        if name in ctx.facts.factors
    }
    if not layers:
        return compiled
    store = FactorStore(None, ctx.env.config.predictor_rank, ctx.env.config.seed)
    watch = WeightWatch({name: each.weight.tensors() for name, each in layers.items()}, moves=moves)

    def run(*args: Any) -> Any:
        # A recomputation reads the choices of its forward. In a dense phase nothing reads factors.
        if running_backward() is None and session.phase != DENSE and (changed := watch.changed()):
            _renew([layer for name, layer in layers.items() if name in changed], store, session)
        return compiled(*args)

    return run


def _renew(layers: list[_Predicted], store: FactorStore, session: Session) -> None:
    """Compute the factors of some layers again, in place; say so, and say which could not be."""
    start = time.perf_counter()
    published = [each.projection.name for each in layers if each.factors.published]
    failed: dict[str, str] = {}
    renewed = []
    for layer in layers:
        name = layer.projection.name
        if layer.factors.published:
            continue
        try:
            found = factors_of(layer.projection, layer.weight.dense(), store)
        except ValueError as error:
            failed[name] = str(error)
            continue
        with torch.no_grad():
            for buffer, value in ((layer.factors.a, found.a), (layer.factors.b, found.b)):
                if buffer is not value:
                    buffer.copy_(value)
        renewed.append(name)
    if renewed:
        session.note_renewal()
        say(
            f"{_listed(renewed)} changed since the factors that predict their channels were computed. They were "
            f"computed again, in {time.perf_counter() - start:.1f} s"
        )
    if published and session.once("published factors of other weights"):
        warnings.warn(
            f"sparselora: {_listed(published)} changed, and the factors that predict their channels are published ones "
            "(predictor_path), made of other weights. Leave the option out to have factors of these weights.",
            stacklevel=3,
        )
    if failed and session.once("changed weights without factors"):
        reasons = "; ".join(failed.values())
        warnings.warn(
            f"sparselora: {_listed(failed)} changed and have no factors now, so that their channels are still chosen "
            f"by the factors of the values before. {reasons}.",
            stacklevel=3,
        )


def _listed(names: Iterable[str] | Mapping[str, str]) -> str:
    first, *others = names
    return f"the frozen weight of {first}" if not others else f"{len(others) + 1} frozen weights ({first} among them)"
