"""Hand the products with frozen weights to the library that is fastest on this processor.

    %y = linear(%x, W, b)     ->     %p = sparselora.frozen_linear(%x, W, provider='cpu_onednn')
                                     %y = add(%p, b)

What sparsity leaves of a site's dense products is lowered as well: the pass runs last.

Legal because: every provider computes the same product, up to rounding; a frozen weight needs no gradient, so the one
product in the backward is again one with a frozen weight.
Declines when: no provider is faster than ATen for the device, the dtype and the width of the result, the weight is cast
before the product or is a tensor subclass, or autocast casts it.
"""

from __future__ import annotations

import torch
from torch import fx

from sparse_compile.graph.facts import Rejection
from sparse_compile.graph.read import argument, op_name, tensor_value
from sparse_compile.graph.rewrite import Rewriter, take_over
from sparse_compile.graph.vocabulary import LINEAR
from sparse_compile.kernels.frozen_linear import FROZEN_LINEAR
from sparse_compile.kernels.providers import REFERENCE, OpCall
from sparse_compile.passes.context import PassContext
from sparse_compile.passes.protocol import Pass, PassOutcome
from sparse_compile.passes.read.autocast import autocast_dtypes

_OPS = torch.ops.sparselora


class LowerFrozenLinears(Pass):
    """Give each product with a frozen weight a provider, where one is faster than ATen."""

    requires = ("canonical",)
    # All of them know dense products by the name that this pass replaces.
    after = ("fuse_adapters", "factor_dora_norm", "fuse_adapted_layers")
    optimises = True

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassOutcome:
        """Rewrite the graph in place."""
        rewriter = Rewriter(gm, self.name)
        casts = autocast_dtypes(gm.graph, ctx.env.autocast, "cpu")
        stats: dict[str, int] = {}
        rejections: dict[Rejection, None] = {}
        for node in list(gm.graph.nodes):
            weight = _frozen_weight(node, ctx)
            value = tensor_value(weight)
            if weight is None or value is None:
                continue
            choice = FROZEN_LINEAR.choose(OpCall(value.device.type, value.dtype, int(value.shape[0])))
            reasons = (
                choice.declined if casts[node.name] is None else ((choice.provider, "autocast casts its operands"),)
            )
            rejections |= {Rejection(self.name, "linear", f"{name}: {reason}"): None for name, reason in reasons}
            if choice.provider != REFERENCE and casts[node.name] is None:
                _rewrite(node, weight, choice.provider, rewriter)
                stats[choice.provider] = stats.get(choice.provider, 0) + 1
        return PassOutcome(bool(stats), stats, tuple(rejections))


def _frozen_weight(node: fx.Node, ctx: PassContext) -> fx.Node | None:
    """Return the weight where `node` is a product with a frozen one as it is stored, or stored transposed."""
    if node.target is not LINEAR:
        return None
    weight = argument(node, "weight")
    stored = argument(weight, "input") if op_name(weight) == "t" else weight
    parameter = ctx.env.parameters.get(stored.name)
    is_plain = parameter is not None and not parameter.trained and not parameter.is_wrapper
    return weight if is_plain else None


def _rewrite(node: fx.Node, weight: fx.Node, provider: str, rewriter: Rewriter) -> None:
    bias = argument(node, "bias")
    with rewriter.before(node):
        x = argument(node, "input")
        y = rewriter.call(_OPS.frozen_linear.default, x, weight, provider=provider)
        if bias is not None:
            y = rewriter.call(torch.add, y, bias)
    take_over(node, y)
