"""What passes share: the environment of the graph, the facts found so far, and the results beside the graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sparse_compile.graph.facts import (
    LossRows,
    MaskedLayer,
    ProductOrder,
    Rejection,
    SitePlan,
    SparsityPlan,
    TokenRoles,
    TokenSlots,
)
from sparse_compile.graph.sites import AttentionSite, FFNSite, Parameter, Projection, Site
from sparse_compile.kernels.providers import Choice, OpCall
from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.options.recipe import AffineMap
from sparse_compile.passes.quantized_weight import QuantizedWeight
from sparse_compile.predictor.svd import LowRankFactors
from sparse_compile.training.token_capacity import OutputCount


@dataclass(frozen=True)
class Environment:
    """What is given with a graph: the user's options, the tensors that enter it, the moment of its compilation.

    Attributes:
        config: the user's options.
        parameters: by placeholder name, every parameter and buffer of the graph.
        values: by placeholder name, the live tensors that enter the graph.
        roles_given: whether `token_roles(...)` is open at this compilation.
        autocast: device types for which autocast was already on where the graph begins, with its dtype.
        stack: `(position, count)` of the part of the model that the graph holds, among the parts alike: the graph of a
            block that was compiled alone is one of `count`; `(0, 1)` for a whole model.
        dense_step: returns, on a device, what tells the phase of the schedule (`Session.dense_step`); None where every
            step is sparse.
        all_output: whether every token of the batches that the graph is for is an output token: a dense step.
        online_maps: by site identity, the buffers of the maps that this model's run fits already, for another graph.
        maps_are_stale: whether weights are known to have changed in the run, under a recipe's maps.
        model_key: tells the model from others whose sites have the same names.
        output_count: the number of output tokens of the batch that is compiled for, where it is known and wanted.
    """

    config: SparseLoRAConfig
    parameters: Mapping[str, Parameter]
    values: Mapping[str, Tensor] = field(default_factory=dict)
    roles_given: bool = False
    autocast: Mapping[str, object] = field(default_factory=dict)
    stack: tuple[int, int] = (0, 1)
    dense_step: Callable[[torch.device], Tensor] | None = None
    all_output: bool = False
    online_maps: Mapping[str, AffineMap] = field(default_factory=dict)
    maps_are_stale: bool = False
    model_key: str = ""
    output_count: OutputCount | None = None


@dataclass(frozen=True)
class Facts:
    """What passes found out about a graph, and decided. Facts refer to nodes by name (see `graph/facts.py`).

    Attributes:
        quantized_weights: by the node that dequantises it, each frozen weight that is stored in 4 bits.
        projections: by name of the base node.
        ffn_sites: in graph order.
        attention_sites: in graph order.
        roles: where token roles come from, None where nothing tells.
        slots: the fixed numbers of rows that tokens are computed in, None where sizes depend on data.
        plan: the decisions.
        factors: by projection name, the predictor's factors of the sites in the plan.
        surrogates: by site identity, the map that stands in the place of each mapped site of the plan.
        loss_rows: the part of the graph that runs on the rows of the loss alone, None where there is none.
        masked_layers: the pruned layers with an adapter.
        product_orders: the order of the products of each layer that could have another.
        selections: by site identity, the nodes that hold the chosen channels: `(channels,)` of an FFN site,
            `(query/key channels, value/output channels)` of an attention site.
        scored: the node that is true at context tokens that are no padding, (B, S); None where no map is fitted in the
            run.
        rows: the nodes that hold the output and the context rows, once they were inserted.
    """

    quantized_weights: Mapping[str, QuantizedWeight] = field(default_factory=dict)
    projections: Mapping[str, Projection] = field(default_factory=dict)
    ffn_sites: tuple[FFNSite, ...] = ()
    attention_sites: tuple[AttentionSite, ...] = ()
    roles: TokenRoles | None = None
    slots: TokenSlots | None = None
    plan: SparsityPlan = field(default_factory=lambda: SparsityPlan(()))
    factors: Mapping[str, LowRankFactors] = field(default_factory=dict)
    surrogates: Mapping[str, AffineMap] = field(default_factory=dict)
    loss_rows: LossRows | None = None
    masked_layers: tuple[MaskedLayer, ...] = ()
    product_orders: tuple[ProductOrder, ...] = ()
    selections: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    scored: str | None = None
    rows: tuple[str, str] | None = None

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every matched site: FFN sites, then attention sites."""
        return (*self.ffn_sites, *self.attention_sites)


@dataclass(frozen=True)
class Results:
    """What lowering made beside the graph, for reports and dumps.

    Attributes:
        providers: by site name, the providers that `lower_sparse_ops` chose.
        kernel_sources: by file name, the source of each kernel that was generated for a site.
    """

    providers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    kernel_sources: Mapping[str, str] = field(default_factory=dict)


@dataclass
class PassContext:
    """What passes share.

    All three parts are immutable. A pass records what it found with `ctx.facts = replace(ctx.facts, ...)`, so that the
    runner restores what was known before a pass that failed.
    """

    env: Environment
    facts: Facts = field(default_factory=Facts)
    results: Results = field(default_factory=Results)

    def frozen_weight(self, projection: Projection) -> Tensor:
        """Return the weight of a layer as it is stored, (out, in) or transposed; dequantised, a fresh tensor."""
        quantized = self.facts.quantized_weights.get(projection.weight)
        if quantized is None:
            value = self.env.parameters[projection.weight].value
            assert value is not None, "a layer without its weight at hand is no projection"
            return value.detach()
        return quantized.dense()

    def weight_inputs(self, projection: Projection) -> tuple[str, ...]:
        """Return the placeholders that hold the weight of a layer."""
        quantized = self.facts.quantized_weights.get(projection.weight)
        if quantized is None:
            return (projection.weight,)
        return tuple(name for name in quantized.operands if name is not None)

    def observed_as(self, site: Site) -> str:
        """Return the key by which the rows of a site are handed on.

        It stands in the graph. The session may become part of another later: what fits the maps keeps this key.
        """
        return f"{self.env.model_key}:{site.identity}"

    def add_sources(self, sources: Mapping[str, str]) -> None:
        """Add the sources of generated kernels, by file name."""
        self.results = replace(self.results, kernel_sources={**self.results.kernel_sources, **sources})

    def op_call(self, plan: SitePlan) -> OpCall:
        """Return what a provider may look at for the ops of a site: its frozen weights, the rank of their factors."""
        dtype, device = self.weight_kind(plan.site.output)
        factors = (self.facts.factors.get(projection.name) for projection in plan.site.projections)
        return OpCall(device, dtype, rank=max((each.a.shape[1] for each in factors if each is not None), default=0))

    def weight_kind(self, projection: Projection) -> tuple[torch.dtype, str]:
        """Return the dtype that the weight of a layer has when it is multiplied with, and its device type."""
        quantized = self.facts.quantized_weights.get(projection.weight)
        if quantized is None:
            value = self.frozen_weight(projection)
            return value.dtype, value.device.type
        return quantized.dtype, quantized.device.type

    def weight_device(self, projection: Projection) -> torch.device:
        """Return the device of the weight of a layer, its number included."""
        quantized = self.facts.quantized_weights.get(projection.weight)
        return self.frozen_weight(projection).device if quantized is None else quantized.device


def declined_providers(rule: str, op: str, choice: Choice) -> dict[Rejection, None]:
    """Return what a pass reports of the providers of an op that were asked and declined, each reason once."""
    return {Rejection(rule, op, f"{name}: {reason}"): None for name, reason in choice.declined}
