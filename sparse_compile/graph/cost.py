"""What a rewrite would cost or save in a training step, before it is made: FLOPs, and bytes moved as FLOPs.

A product of (n, a) with (a, b) counts 2nab FLOPs. Of a frozen layer the forward and the gradient of its input are
counted (there is no weight gradient); of an adapter both gradients. Attention itself is not counted: no rewrite changes
what it computes. All figures are per token and linear in the number of context and output tokens, so that one
expression serves any batch; `sympy` expressions in the symbols `CONTEXT` and `OUTPUT` (numbers of tokens) are what
reports hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy

from sparse_compile.graph.facts import SitePlan, SparsityPlan
from sparse_compile.graph.sites import AttentionSite, FFNSite, Projection, Site

CONTEXT, OUTPUT, LOSS = sympy.symbols("context output loss", nonnegative=True)
"""Numbers of context tokens, of output tokens, and of rows of the loss in a batch."""

FLOPS_PER_BYTE = {"cpu": 20.0, "cuda": 200.0}
"""FLOPs a device could have done in the time it moves one byte: 200 GFLOP/s over 10 GB/s for two CPU cores, 780 TFLOP/s
over 4 TB/s for an H200 in bf16. Only the order of magnitude matters."""

TOKENS = sympy.Symbol("N", positive=True)
"""Number of tokens in a batch, whatever their role."""

MERGE_MARGIN = 0.1
"""Share of the cost of a layer and its adapter that another order of their products must save. Where tensors fit a
cache bytes count for less than here (2% measured where 8% were predicted), and Inductor fuses nothing into an op."""

ASSUMED_CONTEXT_SHARE = 0.75
"""Share of context tokens assumed where a preset is planned: the paper's Math10K has 384 of 512."""


def projection_flops(projection: Projection, kept_share: float = 1.0) -> float:
    """Return the FLOPs of the frozen products for one token, forward and gradient of the input.

    Args:
        projection: the layer.
        kept_share: fraction of the channels that are computed.
    """
    return 4.0 * projection.in_features * projection.out_features * kept_share * len(projection.products)


def site_flops(plan: SitePlan) -> sympy.Expr:
    """Return the FLOPs of the site's frozen products in a training step, over `CONTEXT` and `OUTPUT` tokens."""
    dense = sum(projection_flops(projection) for projection in plan.projections)
    return dense * OUTPUT + dense * plan.kept / plan.total * CONTEXT


def dense_site_flops(plan: SitePlan) -> sympy.Expr:
    """Return the FLOPs of the same products without sparsity."""
    return sum(projection_flops(projection) for projection in plan.projections) * (OUTPUT + CONTEXT)


@dataclass(frozen=True)
class Gain:
    """What sparsity saves and costs at one site, per token of the batch, in FLOPs (bytes converted by the device).

    Attributes:
        saved: FLOPs of products not computed.
        spent: FLOPs of the predictor, and of the time that splitting and merging tokens and gathering weights takes.
    """

    saved: float
    spent: float

    @property
    def pays(self) -> bool:
        """Whether the site is worth it."""
        return self.saved > self.spent


def gain(site: Site, kept: int, rank: int, itemsize: int, device: str, tokens: int) -> Gain:
    """Estimate what sparsity at a site saves and costs, per token.

    Bytes: forward and backward each read and write the rows of every tensor that is split or merged, and the channels
    of each weight that are kept, which are gathered once for all tokens. Measured with 1024 tokens and hidden 1024 on
    two CPU cores: an attention block at 0.2 loses (0.986 of the speed), at 0.5 gains (1.022).

    Args:
        site: the site.
        kept: channels kept.
        rank: rank of the predictor's factors.
        itemsize: bytes of an activation's element.
        device: `"cpu"` or `"cuda"`.
        tokens: of a batch, at the sizes seen at tracing.
    """
    share = kept / site.channels
    dense = sum(projection_flops(projection) for projection in site.projections)
    saved = ASSUMED_CONTEXT_SHARE * (1 - share) * dense
    width, out_width = site.output.in_features, site.output.out_features
    elements = site.projections[0].in_features + out_width
    if isinstance(site, AttentionSite):
        # Queries, keys and values are merged to full width, the attention's result is split again.
        elements += site.query.out_features + site.key.out_features + site.value.out_features + width
        predictor = 2.0 * rank * 3 * site.projections[0].in_features
    else:
        predictor = 2.0 * site.projections[0].in_features
    gathered = share * sum(each.in_features * each.out_features for each in site.projections) / max(tokens, 1)
    moved = 2 * 2 * (elements + gathered) * itemsize
    return Gain(saved, moved * FLOPS_PER_BYTE.get(device, FLOPS_PER_BYTE["cuda"]) + predictor)


def map_gain(site: FFNSite, rank: int, itemsize: int, device: str) -> Gain:
    """Estimate what a map in the place of a feed-forward block saves and costs, per token; as for `gain`.

    Nothing is gathered of a weight and nothing predicted: beside the rows that are split and merged there are the two
    thin products, forward and gradient.

    Args:
        site: the site.
        rank: of the map.
        itemsize: bytes of an activation's element.
        device: `"cpu"` or `"cuda"`.
    """
    saved = ASSUMED_CONTEXT_SHARE * sum(projection_flops(projection) for projection in site.projections)
    elements = site.inputs[0].in_features + site.output.out_features
    moved = 2 * 2 * elements * itemsize * FLOPS_PER_BYTE.get(device, FLOPS_PER_BYTE["cuda"])
    return Gain(saved, moved + ASSUMED_CONTEXT_SHARE * 4.0 * rank * elements)


def saved_flops(plan: SparsityPlan, kind: str) -> sympy.Expr:
    """Return the FLOPs that the plan's sites of one kind save in a training step, over `CONTEXT` tokens."""
    plans = [each for each in plan.sparse_sites if each.site.kind == kind]
    return sum((dense_site_flops(each) - site_flops(each) for each in plans), sympy.Integer(0))


def fused_adapters_pay(tokens: int, in_features: int, ranks: Sequence[int], *, input_gradient: bool) -> bool:
    """Tell whether one stacked product of adapters that read the same x moves fewer bytes than a product for each.

    FLOPs are equal. For every adapter but one, x is read once less in each direction, and one gradient of x less is
    written and added up. Paid for that: the factors are copied into a stack and their gradients out of one, and the
    gradients of the thin products are copied side by side.

    Args:
        tokens: number of rows of x.
        in_features: width of x.
        ranks: rank of each adapter.
        input_gradient: whether x needs a gradient.
    """
    saved = (len(ranks) - 1) * (4 if input_gradient else 2) * tokens * in_features
    spent = 4 * sum(ranks) * in_features + 2 * tokens * sum(ranks)
    return saved > spent


def association_costs(
    in_features: int,
    out_features: int,
    rank: int,
    flops_per_byte: float = 0.0,
    itemsize: int = 4,
    *,
    readers: int = 1,
    input_gradient: bool = True,
) -> dict[str, sympy.Expr]:
    """Return what a frozen layer with one adapter costs in a step, by order of its products, over `TOKENS`.

    The names are those of `kernels/merged_linear`, except that F1B1 is the layer as it was captured: its products are
    added by passes of their own over (N, out) and (N, in), where the op accumulates. F2 forms no `x A'`, which its
    backward then needs.

    Args:
        in_features: width of x.
        out_features: width of y.
        rank: r.
        flops_per_byte: what a byte moved counts, as in `FLOPS_PER_BYTE`; 0 counts FLOPs alone.
        itemsize: bytes of an element.
        readers: number of adapters of the same x: of F1B1 their products are fused, so each pays its share of x.
        input_gradient: whether x needs a gradient; without it the order of the backward has no meaning.
    """
    n, moved = TOKENS, flops_per_byte * itemsize

    def product(rows: Any, inner: Any, columns: Any, *, accumulate: bool = False) -> sympy.Expr:
        elements = rows * inner + inner * columns + (2 if accumulate else 1) * rows * columns
        return 2 * rows * inner * columns + moved * elements

    merge = product(out_features, rank, in_features, accumulate=True)
    base = product(n, in_features, out_features)
    thin = product(n, in_features, rank)
    factors = product(n, out_features, rank) + product(rank, n, in_features) + product(out_features, n, rank)
    base_gradient, thin_gradient = product(n, out_features, in_features), product(n, rank, in_features, accumulate=True)

    # Of x and its gradient: read twice, written, and added up (two reads, one write).
    shared = moved * n * in_features * (5 if input_gradient else 2)
    f1b1 = base + thin + product(n, rank, out_features) + factors + moved * 5 * n * out_features
    f1b1 += (base_gradient + thin_gradient + moved * 2 * n * in_features) if input_gradient else 0
    costs = {"F1B1": f1b1 - shared * sympy.Rational(readers - 1, readers)}
    forward = {"F1": base + thin + product(n, rank, out_features, accumulate=True), "F2": base + merge + thin}
    backward = {"B1": base_gradient + thin_gradient, "B5": merge + base_gradient}
    if not input_gradient:
        return costs | {"F2B1": sympy.expand(forward["F2"] + factors)}
    orders = (("F1", "B5"), ("F2", "B1"), ("F2", "B5"))
    costs |= {f + b: sympy.expand(forward[f] + factors + backward[b]) for f, b in orders}
    return costs


def masked_layer_flops(
    in_features: int, out_features: int, rank: int, *, exact: bool, input_gradient: bool = True
) -> sympy.Expr:
    """Return what masking adds to the FLOPs of a layer and its adapter in a step, over `TOKENS`.

    The weight is merged once in each direction; the adapter's products with all tokens are left in the backward alone.

    Args:
        in_features: width of x.
        out_features: width of y.
        rank: r.
        exact: whether the adapter's gradients are those of the masked function, else straight-through.
        input_gradient: whether x needs a gradient.
    """
    n, size = TOKENS, in_features * out_features
    product, merge, thin = 2 * n * size, 2 * size * rank, 2 * n * rank * (in_features + out_features)
    factors = product + 2 * merge if exact else 2 * thin
    masked = (product + merge) * (2 if input_gradient else 1) + factors
    plain = association_costs(in_features, out_features, rank, input_gradient=input_gradient)["F1B1"]
    return sympy.expand(masked - plain)
