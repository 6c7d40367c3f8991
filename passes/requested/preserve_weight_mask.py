"""Train the adapter of a pruned layer so that the zeros of the weight stay zeros (LoRS, arXiv 2501.08582, section 3).

    %base   = linear(%x, W, b)
    %low    = linear(%x, A)
    %up     = linear(%low, B)          ->     %output = sparselora.masked_linear(%x, W, A, B, b, s, 'straight-through',
    %scaled = mul(%up, s)                                                        'blocks')
    %output = add(%base, %scaled)

The layer becomes x W~' + b with W~ = (W + s B A) * (W != 0), so that what is merged after training (`merge_masked`) is
what was trained. It is another function than the captured one, which is why it is an option, `preserve_weight_mask`;
where that is on it holds with every preset, in the dense phase and the sparse one, and in evaluation. A weight counts
as pruned from `mask_threshold` zeros on; that is decided when the graph is compiled, while which entries are zero is
read in each step.

Casts are as the layer's own: x and y have the dtype of the base product, in autocast that of the region, and W~ is
merged in fp32 or wider and rounded to it once.

A masked layer and contextual sparsity exclude each other: a site with a masked layer leaves the plan, with a reason.
The mask goes first because zeros that one phase filled are lost.

Declines when: fewer entries are zero, the adapter's input is dropped out (no weight holds what a dropout leaves), there
are several adapters, it is DoRA's, A or B has a bias, a product in between is read elsewhere, the layers stand in
different checkpoints, something else reads the weight (a tied embedding would change with a merge), or the weight is
packed (bitsandbytes). A pruned layer that is declined is warned of: its zeros will be lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, fx

from sparse_compile.graph.cost import TOKENS, masked_layer_flops
from sparse_compile.graph.declined import Declined
from sparse_compile.graph.facts import MaskedLayer, Rejection, SitePlan, SparsityPlan
from sparse_compile.graph.read import argument, hinted_shape, nodes_by_name, strip_casts, tensor_of
from sparse_compile.graph.rewrite import Rewriter, take_over
from sparse_compile.graph.sites import Projection
from sparse_compile.graph.walk import readers
from sparse_compile.kernels.masked_linear import MASKED_LINEAR
from sparse_compile.kernels.masked_linear.pattern import mask_pattern, zero_fraction
from sparse_compile.kernels.providers import OpCall
from sparse_compile.passes.context import PassContext
from sparse_compile.passes.protocol import Numerics, Pass, PassOutcome
from sparse_compile.passes.read.adapted_layer import AdaptedLayer, adapted_layer
from sparse_compile.passes.read.autocast import autocast_dtypes
from sparse_compile.torch_private.aten import overload
from sparse_compile.torch_private.fake import UNKNOWN_SIZE

_OPS = torch.ops.sparselora
MASKED_SITE = "its adapters keep the zeros of pruned weights (preserve_weight_mask), which needs whole layers"


class PreserveWeightMask(Pass):
    """Make one masked product of each pruned layer and its adapter."""

    requires = ("projections",)
    # Masked sites leave the plan, where there is one.
    after = ("plan_sparsity", "select_loss_rows")
    numerics = Numerics.REQUESTED

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassOutcome:
        """Rewrite the graph in place."""
        if ctx.env.config.preserve_weight_mask == "off":
            return PassOutcome(False)
        rewriter = Rewriter(gm, self.name)
        matcher = _Matcher(gm.graph, ctx)
        layers: list[MaskedLayer] = []
        rejections = [Rejection(self.name, name, reason) for name, reason in _packed_layers(gm.graph, ctx)]
        for projection in adapted_projections(ctx):
            if projection.base not in matcher.nodes:
                continue
            weight = stored_weight(projection, ctx)
            sparsity = zero_fraction(weight)
            if sparsity < ctx.env.config.mask_threshold:
                reason = f"less than {ctx.env.config.mask_threshold:.0%} of its weight is zero"
                rejections.append(Rejection(self.name, projection.name, reason))
                continue
            layer = MaskedLayer(projection.name, projection.base, sparsity, mask_pattern(weight), 0.0)
            try:
                found = matcher.match(projection)
            except Declined as declined:
                rejections.append(declined.by(self.name))
                layers.append(replace(layer, reason=declined.reason))
                continue
            layers.append(replace(layer, added_flops=_added_flops(found, projection, ctx)))
            _rewrite(found, projection, matcher.compute_dtype(found), rewriter, ctx)
        ctx.facts = replace(ctx.facts, masked_layers=tuple(layers))
        plans, left = _without_masked_sites(ctx)
        ctx.facts = replace(ctx.facts, plan=SparsityPlan(plans))
        rejections += [Rejection(self.name, name, MASKED_SITE) for name in left]
        masked = sum(not layer.reason for layer in layers)
        stats = {"masked": masked, "declined": len(layers) - masked}
        return PassOutcome(rewriter.inserted > 0, stats, tuple(rejections))


def adapted_projections(ctx: PassContext) -> Iterator[Projection]:
    """Yield the layers with an adapter of any kind: those whose zeros are counted. A weight in 4 bits has none."""
    return (
        projection
        for projection in ctx.facts.projections.values()
        if projection.adapters and projection.weight not in ctx.facts.quantized_weights
    )


def stored_weight(projection: Projection, ctx: PassContext) -> Tensor:
    """Return the live weight of a layer, (out, in)."""
    value = ctx.env.parameters[projection.weight].value
    assert value is not None, "a layer without its weight at hand is no projection"
    return value.detach().t() if projection.transposed else value.detach()


class _Matcher:
    """Finds the operands of masked products."""

    def __init__(self, graph: fx.Graph, ctx: PassContext) -> None:
        self.ctx = ctx
        self.nodes = nodes_by_name(graph)
        self.autocast = {device: autocast_dtypes(graph, ctx.env.autocast, device) for device in ("cpu", "cuda")}
        # Taken now: a layer that runs twice is rewritten one product at a time.
        self.readers = {each.weight: _readers_of(self.nodes[each.weight]) for each in adapted_projections(ctx)}
        self.factors = {each.base: self._factors(each) for each in ctx.facts.projections.values()}

    def match(self, projection: Projection) -> AdaptedLayer:
        """Return a pruned layer with its adapter.

        Raises:
            Declined: its zeros cannot be kept.
        """
        layer = adapted_layer(projection, self.nodes)
        reading = {self.factors.get(name) for name in self.readers[projection.weight]}
        if reading != {self.factors[projection.base]}:
            reason = "something else reads its weight (a tied embedding?), and would change with a merge"
            raise Declined(projection.name, reason)
        return layer

    def _factors(self, projection: Projection) -> tuple[fx.Node, ...]:
        """Return the stored factors of a layer's adapters."""
        products = (name for branch in projection.adapters for name in (branch.a, branch.b))
        return tuple(
            strip_casts(operand)
            for name in products
            if name in self.nodes and isinstance(operand := argument(self.nodes[name], "weight"), fx.Node)
        )

    def compute_dtype(self, layer: AdaptedLayer) -> torch.dtype:
        """Return the dtype that the base product is computed in."""
        value = tensor_of(layer.x)
        cast = self.autocast.get(value.device.type, {}).get(layer.products[0].name)
        # fp64 operands are left alone by autocast.
        return value.dtype if cast is None or value.dtype == torch.float64 else cast


def _readers_of(weight: fx.Node) -> frozenset[str]:
    """Return the names of what reads a weight, through casts and transposes."""
    found = readers(weight, through=lambda node: strip_casts(node) is not node or node.target in ("t", torch.t))
    return frozenset(node.name for node in found)


def _packed_layers(graph: fx.Graph, ctx: PassContext) -> Iterator[tuple[str, str]]:
    """Yield the layers whose weights are packed, each with the reason to leave it."""
    reason = "its weight is packed in 4 or 8 bits, which hold no zeros that a merge could keep"
    yield from ((weight.path, reason) for weight in ctx.facts.quantized_weights.values())
    for node in graph.nodes:
        op = overload(node.target)
        if op is not None and op.namespace == "bitsandbytes":
            weights = [
                ctx.env.parameters[operand.name].path
                for operand in node.all_input_nodes
                if operand.name in ctx.env.parameters
            ]
            name = weights[0] if weights else node.name
            yield name, reason


def _added_flops(layer: AdaptedLayer, projection: Projection, ctx: PassContext) -> float:
    value, tokens = tensor_of(layer.x), hinted_shape(layer.x)[:-1]
    if UNKNOWN_SIZE in tokens:
        return 0.0
    rank = hinted_shape(layer.a)[0]
    exact = ctx.env.config.mask_gradient == "exact"
    widths = projection.in_features, projection.out_features
    added = masked_layer_flops(*widths, rank, exact=exact, input_gradient=value.requires_grad)
    return float(added.subs(TOKENS, math.prod(tokens)))


def _rewrite(
    layer: AdaptedLayer, projection: Projection, dtype: torch.dtype, rewriter: Rewriter, ctx: PassContext
) -> None:
    value, output = tensor_of(layer.x), tensor_of(layer.output)
    provider = MASKED_LINEAR.choose(OpCall(value.device.type, dtype), ctx.env.config.kernels).provider
    with rewriter.before(layer.output, projection.name):
        x = layer.x if value.dtype == dtype else rewriter.method("to", layer.x, dtype)
        factors = (strip_casts(layer.weight), strip_casts(layer.a), strip_casts(layer.b))
        operands = (x, *factors, layer.bias, layer.scale, ctx.env.config.mask_gradient, provider)
        y = rewriter.call(_OPS.masked_linear.default, *operands)
        if output.dtype != dtype:
            y = rewriter.method("to", y, output.dtype)
    take_over(layer.output, y)


def _without_masked_sites(ctx: PassContext) -> tuple[tuple[SitePlan, ...], list[str]]:
    """Return the plan without sparsity at sites that have a masked layer, and the names of those that had some."""
    masked = {layer.base for layer in ctx.facts.masked_layers if not layer.reason}
    plans, left = [], []
    for plan in ctx.facts.plan.sites:
        if plan.sparse and masked.intersection(_bases(plan.site.projections)):
            plans.append(SitePlan(plan.site, 0.0, plan.total, plan.total, MASKED_SITE))
            left.append(plan.site.name)
        else:
            plans.append(plan)
    return tuple(plans), left


def _bases(projections: Iterable[Projection]) -> set[str]:
    return {projection.base for projection in projections}
