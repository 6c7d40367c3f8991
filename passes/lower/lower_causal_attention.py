"""Leave out the scores above the diagonal of attention whose mask forbids them, where the fused kernel computes them.

    %a = scaled_dot_product_attention(%q, %k, %v, %mask)   ->   %m = where(%mask, 0.0, -inf)          once a mask
                                                                %a = sparselora.causal_attention(%q, %k, %v, %m, s)[0]

Models of transformers hand over a mask whenever they are compiled, so that not even `is_causal` is known to the kernel;
and on a CPU the kernel skips blocks of 512 keys at the least (`kernels/causal_attention`).

Legal because: a score that the mask sets to minus infinity has weight zero, forward and backward.
Declines when: no provider is faster for the device, attention drops weights out, there are few tokens, keys are not as
many as queries or fewer heads than queries have, or the mask cannot be shown to forbid every later key
(`causal_mask`): it is an input of the graph, or of packed sequences with positions that are.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from sparse_compile.graph.declined import Declined
from sparse_compile.graph.facts import Rejection
from sparse_compile.graph.read import argument, hinted_shape, op_name, tensor_of, tensor_value
from sparse_compile.graph.rewrite import Rewriter, take_over
from sparse_compile.kernels.causal_attention import CAUSAL_ATTENTION
from sparse_compile.kernels.providers import REFERENCE, OpCall
from sparse_compile.passes.context import PassContext
from sparse_compile.passes.protocol import Pass, PassOutcome
from sparse_compile.passes.read.autocast import autocast_dtypes
from sparse_compile.passes.read.causal_mask import CausalMasks
from sparse_compile.passes.read.fused_attention import operands_of, scale_of
from sparse_compile.passes.read.mutation import written_in_place
from sparse_compile.torch_private.fake import size_expression

_OPS = torch.ops.sparselora

SHORTEST = 256
"""Tokens from which on blocks of queries pay: for 256 they took 0.83 of the time."""


class LowerCausalAttention(Pass):
    """Replace attention under a causal mask by an op that skips what the mask forbids."""

    requires = ("canonical",)
    # Both know attention by the name that this pass replaces.
    after = ("find_attention", "select_loss_rows")
    optimises = True

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassOutcome:
        """Rewrite the graph in place."""
        rewriter = Rewriter(gm, self.name)
        casts = autocast_dtypes(gm.graph, ctx.env.autocast, "cpu")
        attentions = [node for node in gm.graph.nodes if op_name(node) == "scaled_dot_product_attention"]
        masks = CausalMasks(written_in_place(gm.graph) if attentions else ())
        additive: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
        stats: dict[str, int] = {}
        rejections: list[Rejection] = []
        for node in attentions:
            query = tensor_value(argument(node, "query"))
            if query is None:
                continue
            try:
                provider = _provider(node, query)
                _check_attention(node, casts[node.name], masks)
            except Declined as declined:
                rejections.append(declined.by(self.name))
                continue
            _rewrite(node, provider, rewriter, additive)
            stats[provider] = stats.get(provider, 0) + 1
        return PassOutcome(bool(stats), stats, tuple(rejections))


def _mask(node: fx.Node) -> fx.Node | None:
    mask = argument(node, "attn_mask")
    return mask if isinstance(mask, fx.Node) else None


def _provider(node: fx.Node, query: Tensor) -> str:
    """Return what computes an attention; decline where nothing does it faster."""
    choice = CAUSAL_ATTENTION.choose(OpCall(query.device.type, query.dtype))
    if choice.provider == REFERENCE:
        name, reason = choice.declined[0]
        raise Declined(node, f"{name}: {reason}")
    return choice.provider


def _check_attention(node: fx.Node, cast: torch.dtype | None, masks: CausalMasks) -> None:
    """Decline an attention that the op does not compute, or whose mask may allow a later key."""
    values = [tensor_value(operand) for operand in operands_of(node)]
    mask = _mask(node)
    if argument(node, "dropout_p", 0.0):
        raise Declined(node, "its weights are dropped out")
    if mask is None:
        raise Declined(node, "it has no mask: the fused kernel knows by itself what it may skip")
    allowed = tensor_value(mask)
    if allowed is None or allowed.dtype != torch.bool or argument(node, "is_causal", False):
        raise Declined(node, "its mask is not one of allowed keys")
    if cast is not None or any(value is None or value.dim() != 4 for value in values):
        raise Declined(node, "autocast casts its operands, or they are not of (batch, heads, tokens, channels)")
    shapes = {tuple(size_expression(size) for size in value.shape) for value in values if value is not None}
    if len(shapes) > 1 or len({value.dtype for value in values if value is not None}) > 1:
        raise Declined(node, "queries, keys and values differ in their numbers of tokens, heads or channels")
    length = shapes.pop()[2]
    if allowed.dim() != 4 or [size_expression(size) for size in allowed.shape[2:]] != [length, length]:
        raise Declined(node, "its mask is not of (batch, heads, tokens, tokens)")
    if hinted_shape(node)[2] < SHORTEST:
        raise Declined(node, f"fewer than {SHORTEST} tokens: blocks of queries would be too small")
    if not masks.forbids_later_keys(mask):
        raise Declined(node, "nothing shows that its mask forbids every later key")


def _rewrite(
    node: fx.Node, provider: str, rewriter: Rewriter, additive: dict[tuple[fx.Node, torch.dtype], fx.Node]
) -> None:
    query, key, value = operands_of(node)
    mask, like = _mask(node), tensor_of(query)
    assert mask is not None
    if (mask, like.dtype) not in additive:
        # Behind the mask, before the first block: each of them reads it.
        with rewriter.before(mask.next):
            forbidden = rewriter.call(torch.logical_not, mask)
            zeros = rewriter.call(torch.zeros_like, mask, dtype=like.dtype)
            additive[mask, like.dtype] = rewriter.method("masked_fill", zeros, forbidden, float("-inf"))
    with rewriter.before(node):
        operands = (query, key, value, additive[mask, like.dtype])
        pair = rewriter.call(_OPS.causal_attention.default, *operands, scale_of(node), provider=provider)
        out, *_ = rewriter.items(pair, 1)
    take_over(node, out)
