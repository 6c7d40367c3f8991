"""Associate the products of a frozen layer and its adapter in the order that is cheapest (RunLoRA, arXiv 2312.03415).

    %base   = linear(%x, W, b)
    %low    = linear(%x, A)                   %pair   = sparselora.merged_linear(%x, W, A, B, b, s, 'F2B5')
    %up     = linear(%low, B)          ->     %output = getitem(%pair, 0)
    %scaled = mul(%up, s)
    %output = add(%base, %scaled)

Forward, F1 is x W' + s (x A') B' and F2 is x (W + s B A)'; for the gradient of x, B1 is dy W + s (dy B) A and B5 is
dy (W + s B A). With many tokens for the width of the layer it is cheaper to merge the weight than to carry all tokens
through the adapter: F2 where N > in, B5 where N > out, if that saves more than a margin over the layer as it stands.
F1B1 is the layer as it stands. The choice is made once, by the number of tokens seen at tracing; it is right for any
number, and the number at which it would turn is recorded.

Legal because: matrix products associate; what differs is rounding. The op saves x, W, A, B, never a merged weight.
Declines when: the adapter's input is dropped out (what is dropped for the adapter is not dropped for the layer), there
are several adapters or one that is weight-decomposed (DoRA), A or B has a bias, the scale is no number, dtypes differ
or autocast casts, a product in between is read elsewhere, the layer is in a sparse site, the dtype is fp16 or bf16 (a
merged weight is rounded to it; the option `merge_low_precision` allows that), or the number of tokens is known at run
time only.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import sympy
import torch
from torch import fx

from sparse_compile.graph.cost import FLOPS_PER_BYTE, MERGE_MARGIN, TOKENS, association_costs
from sparse_compile.graph.declined import Declined
from sparse_compile.graph.facts import ProductOrder, Rejection, SitePlan
from sparse_compile.graph.read import hinted_shape, nodes_by_name, tensor_of, tensor_value
from sparse_compile.graph.rewrite import Rewriter, take_over
from sparse_compile.graph.sites import AttentionSite, Projection
from sparse_compile.passes.context import PassContext
from sparse_compile.passes.protocol import Pass, PassOutcome
from sparse_compile.passes.read.adapted_layer import AdaptedLayer, adapted_layer
from sparse_compile.passes.read.adapter_inputs import adapters_by_input
from sparse_compile.passes.read.autocast import autocast_dtypes
from sparse_compile.torch_private.fake import UNKNOWN_SIZE

_OPS = torch.ops.sparselora


class OrderAdapterProducts(Pass):
    """Merge a layer and its adapter, forward or backward, where the cost model says that it pays."""

    requires = ("plan",)
    # A masked layer is not merged.
    after = ("preserve_weight_mask",)
    optimises = True

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassOutcome:
        """Rewrite the graph in place."""
        rewriter = Rewriter(gm, self.name)
        matcher = _Matcher(gm.graph, ctx)
        readers = {adapter.branch.a: len(group) for group in adapters_by_input(gm.graph, ctx) for adapter in group}
        orders: list[ProductOrder] = []
        rejections: list[Rejection] = []
        for projection in ctx.facts.projections.values():
            try:
                found = matcher.match(projection)
            except Declined as declined:
                rejections.append(declined.by(self.name))
                continue
            if found is not None:
                order = _cheapest(found, projection, readers[projection.branches[0].a])
                orders.append(order)
                if order.order != "F1B1":
                    _rewrite(found, projection, order.order, rewriter)
        ctx.facts = replace(ctx.facts, product_orders=tuple(orders))
        stats = dict(Counter(order.order for order in orders))
        return PassOutcome(rewriter.inserted > 0, stats, tuple(rejections))


def _split(plan: SitePlan) -> tuple[Projection, ...]:
    """Return the layers of a site whose tokens are split by role: not the keys and values of what context has left."""
    if isinstance(plan.site, AttentionSite) and plan.left:
        return (plan.site.query, plan.site.output)
    return plan.site.projections


class _Matcher:
    """Checks that nothing but a layer and its adapter stands between x and the output."""

    def __init__(self, graph: fx.Graph, ctx: PassContext) -> None:
        self.ctx = ctx
        self.nodes = nodes_by_name(graph)
        self.sparse = {projection.base for plan in ctx.facts.plan.split_sites for projection in _split(plan)}
        self.autocast = {device: autocast_dtypes(graph, ctx.env.autocast, device) for device in ("cpu", "cuda")}

    def match(self, projection: Projection) -> AdaptedLayer | None:
        """Return a layer with its adapter, or None where there is none, or the layer is gone or sparse.

        Raises:
            Declined: its products are left alone.
        """
        if not projection.branches or projection.base not in self.nodes or projection.base in self.sparse:
            return None
        if projection.weight in self.ctx.facts.quantized_weights:
            reason = "its weight is stored in 4 bits, and a merged one would be a dense copy of it"
            raise Declined(projection.name, reason)
        layer = adapted_layer(projection, self.nodes)
        self._check_merge(layer, projection.name)
        return layer

    def _check_merge(self, layer: AdaptedLayer, name: str) -> None:
        """Decline a layer whose merged product would round otherwise, or whose tokens cannot be counted."""
        value = tensor_value(layer.x)
        if layer.cast or value is None:
            raise Declined(name, "the layer and its adapter compute in different dtypes")
        casts = {self.autocast.get(value.device.type, {}).get(node.name) for node in layer.products}
        if casts != {None} and value.dtype != torch.float64:
            raise Declined(name, "autocast casts its operands, which it does not do for a merged product")
        low_precision = value.dtype not in (torch.float32, torch.float64)
        if low_precision and not self.ctx.env.config.merge_low_precision:
            dtype = str(value.dtype).removeprefix("torch.")
            raise Declined(name, f"a weight merged in {dtype} is rounded (see merge_low_precision)")
        if UNKNOWN_SIZE in hinted_shape(layer.x)[:-1]:
            raise Declined(name, "its number of tokens is known at run time only")


def _cheapest(layer: AdaptedLayer, projection: Projection, readers: int) -> ProductOrder:
    """Choose the order of the products, by the number of tokens seen at tracing."""
    value = tensor_of(layer.x)
    tokens = math.prod(hinted_shape(layer.x)[:-1])
    rank = hinted_shape(layer.a)[0]
    widths = projection.in_features, projection.out_features
    needs_gradient = value.requires_grad
    flops_per_byte = FLOPS_PER_BYTE.get(value.device.type, FLOPS_PER_BYTE["cuda"])
    costs = association_costs(
        *widths, rank, flops_per_byte, value.element_size(), readers=readers, input_gradient=needs_gradient
    )
    flops = association_costs(*widths, rank, input_gradient=needs_gradient)
    at = {name: float(cost.subs(TOKENS, tokens)) for name, cost in costs.items()}
    merged = min((name for name in costs if name != "F1B1"), key=at.__getitem__)
    order = merged if at[merged] < (1 - MERGE_MARGIN) * at["F1B1"] else "F1B1"
    return ProductOrder(
        projection=projection.name,
        order=order,
        tokens=tokens,
        costs=tuple((name, str(sympy.expand(cost))) for name, cost in costs.items()),
        saved_flops=float((flops["F1B1"] - flops[order]).subs(TOKENS, tokens)),
        break_even=break_even(costs),
    )


def break_even(costs: Mapping[str, sympy.Expr]) -> str:
    """Return the condition on `TOKENS` under which one of the merged orders pays; each cost is linear in it."""
    spared = [sympy.expand((1 - MERGE_MARGIN) * costs["F1B1"] - cost) for name, cost in costs.items() if name != "F1B1"]
    # Merging costs the same for any number of tokens, so for few it never pays.
    assert all(spare.coeff(TOKENS, 0) <= 0 for spare in spared)
    turns = [-spare.coeff(TOKENS, 0) / spare.coeff(TOKENS, 1) for spare in spared if spare.coeff(TOKENS, 1) > 0]
    return f"{TOKENS} > {math.floor(min(turns))}" if turns else "never"


def _rewrite(layer: AdaptedLayer, projection: Projection, order: str, rewriter: Rewriter) -> None:
    with rewriter.before(layer.output, projection.name):
        operands = (layer.x, layer.weight, layer.a, layer.b, layer.bias)
        pair = rewriter.call(_OPS.merged_linear.default, *operands, layer.scale, order)
        output, *_ = rewriter.items(pair, 1)
    take_over(layer.output, output)
