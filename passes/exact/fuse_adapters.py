"""Fuse the adapters that read the same tensor into one product with their stacked factors.

    %a_q = linear(%x, A_q)            %stacked = linear(%x, cat([A_q, A_k, A_v]))
    %a_k = linear(%x, A_k)     ->     %a_q, %a_k, %a_v = split_with_sizes(%stacked, [r_q, r_k, r_v], -1)
    %a_v = linear(%x, A_v)

Everything behind the products with A (B, scale, casts, addition) stays as it is. Backward, the gradients of the slices
are put side by side, and x gets one gradient instead of three that are added up, A one product that is cut in three.

Legal because: the rows of a product with A do not see each other; each slice holds the numbers the product held.
Declines when: the adapters draw dropouts of their own (two draws of one tensor are two tensors), an A has a bias, the
tensor is written to in between, a slice would be, the cost model sees no gain (the stacked factors are a copy, made in
each step), or (silently) they stand in different checkpoints, regions of autocast, or dtypes, or only
some are trained. Of a sparse feed-forward block the adapters of the out-projection are left alone: their columns are
gathered.

Base products that read the same tensor are not stacked. A stack of frozen weights would have to stay alive beside the
originals (q, k and v of Llama-3-8B: 50 MB a block in bf16, 1.6 GB in all), or be written anew in each step (100 MB of
traffic a block) to save two reads of x (2 x 33 MB for 4096 tokens) of products that are bound by arithmetic anyway.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import torch
from torch import fx

from sparse_compile.graph.cost import fused_adapters_pay
from sparse_compile.graph.declined import Declined
from sparse_compile.graph.facts import Rejection
from sparse_compile.graph.read import argument, hinted_shape, tensor_of
from sparse_compile.graph.rewrite import Rewriter, take_over
from sparse_compile.graph.sites import FFNSite
from sparse_compile.graph.vocabulary import LINEAR
from sparse_compile.passes.context import PassContext
from sparse_compile.passes.protocol import Pass, PassOutcome
from sparse_compile.passes.read.adapter_inputs import Adapter, adapters_by_input
from sparse_compile.passes.read.mutation import mutation_between, writes_in_place
from sparse_compile.passes.read.projections import site_name


class FuseAdapters(Pass):
    """Give adapters of the same tensor one stacked product."""

    requires = ("plan",)
    # A merged adapter has no product of its own left.
    after = ("order_adapter_products",)
    optimises = True

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassOutcome:
        """Rewrite the graph in place."""
        rewriter = Rewriter(gm, self.name)
        gathered = _gathered_products(ctx)
        groups = [part for group in adapters_by_input(gm.graph, ctx) for part in _by_gradient(group)]
        readers = Counter(adapter.projection.source for group in groups for adapter in group)
        rejections: list[Rejection] = []
        stats = {"groups": 0, "adapters": 0}
        for group in groups:
            adapters = []
            for adapter in group:
                try:
                    _check_adapter(adapter, len(group), readers[adapter.projection.source], gathered)
                except Declined as declined:
                    rejections.append(declined.by(self.name))
                else:
                    adapters.append(adapter)
            if len(adapters) < 2:
                continue
            try:
                _check_group(adapters)
            except Declined as declined:
                rejections.append(declined.by(self.name))
                continue
            _fuse(adapters, rewriter)
            stats["groups"] += 1
            stats["adapters"] += len(adapters)
        return PassOutcome(stats["groups"] > 0, stats, tuple(rejections))


def _by_gradient(group: list[Adapter]) -> Iterator[list[Adapter]]:
    """Part the trained factors from the frozen ones, of which a stack would compute gradients."""
    for trained in (True, False):
        part = [adapter for adapter in group if tensor_of(argument(adapter.product, "weight")).requires_grad == trained]
        if part:
            yield part


def _gathered_products(ctx: PassContext) -> set[str]:
    """Return the products with A whose columns a sparse feed-forward block gathers: they must stay products."""
    outputs = [plan.site.output for plan in ctx.facts.plan.predicted_sites if isinstance(plan.site, FFNSite)]
    return {branch.a for projection in outputs for branch in projection.adapters}


def _check_adapter(adapter: Adapter, group: int, readers: int, gathered: set[str]) -> None:
    """Decline an adapter that cannot be fused with those beside it."""
    name = adapter.projection.name
    if group == 1 and readers > 1 and adapter.branch.dropout:
        reason = "its dropout draws for it alone: its input is another tensor than that of the adapters beside it"
        raise Declined(name, reason)
    if group == 1 and readers > 1:
        reason = "its dtype, region of autocast, checkpoint or training is another than that of the adapters beside it"
        raise Declined(name, reason)
    if group == 1:
        return  # nothing is beside it
    if adapter.bias:
        raise Declined(name, "its A has a bias")
    if adapter.product.name in gathered:
        raise Declined(name, "its block is sparse: the columns of its A are gathered")
    if any(writes_in_place(user) for user in adapter.product.users):
        raise Declined(name, "the product with its A is written to in place")


def _check_group(adapters: list[Adapter]) -> None:
    """Decline adapters whose input may change between them, or that gain nothing by one product."""
    name = adapters[0].projection.name
    first, last = adapters[0].product, adapters[-1].product
    root = adapters[0].root
    written = mutation_between(root, last)
    if written is not None:
        raise Declined(name, f"{root.name}, which they read, may be written to in between ({written.name})")
    x = argument(first, "input")
    *leading, width = hinted_shape(x)
    value = tensor_of(x)
    ranks = [hinted_shape(adapter.product)[-1] for adapter in adapters]
    if not fused_adapters_pay(math.prod(leading), width, ranks, input_gradient=value.requires_grad):
        raise Declined(name, "stacking their factors moves more bytes than reading their input once saves")


def _fuse(adapters: list[Adapter], rewriter: Rewriter) -> None:
    products = [adapter.product for adapter in adapters]
    first = products[0]
    with rewriter.before(first, site_name(tuple(adapter.projection for adapter in adapters))):
        factors = [_available_before(first, argument(product, "weight"), rewriter) for product in products]
        stacked_factors = rewriter.call(torch.cat, factors)
        stacked = rewriter.call(LINEAR, argument(first, "input"), stacked_factors, None)
        ranks = [hinted_shape(product)[-1] for product in products]
        # Its gradient is one `cat`; the gradients of slices would be padded with zeros and added up.
        slices = rewriter.items(rewriter.call(torch.split_with_sizes, stacked, ranks, -1), len(ranks))
    for product, part in zip(products, slices, strict=True):
        take_over(product, part)


def _available_before(anchor: fx.Node, operand: fx.Node, rewriter: Rewriter) -> fx.Node:
    """Return a factor, or where it is cast or transposed behind `anchor`, a copy of that before it."""
    if operand.op == "placeholder" or operand < anchor:
        return operand
    return rewriter.copy(operand, lambda source: _available_before(anchor, source, rewriter))
