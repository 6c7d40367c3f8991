"""Give the output tokens, and the rows of the loss, a fixed number of slots: for graphs without a data-dependent size.

    token_bucket=128, 300 output tokens    C = 384 slots for output tokens, N - 256 for context tokens, 384 for the loss
    token_capacity=512                     C = 512 slots for output tokens, N for context tokens, 512 for the loss

With a bucket the number of output tokens is known to lie in (C - bucket, C], so context tokens need no more than
N - C + bucket slots: N + bucket together, whatever the split. A row of the loss is an output token, or the op says so.

Declines when: nothing tells how many output tokens the batch has (`token_capacity.py`), or what was counted is not what
the graph reads: several losses with labels of their own, another `ignore_index`.
Leaves alone: a graph for which neither option is set.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from sparse_compile.graph.declined import Declined
from sparse_compile.graph.facts import TokenSlots
from sparse_compile.passes.context import PassContext
from sparse_compile.passes.protocol import Pass, PassOutcome
from sparse_compile.training.token_capacity import capacity_for


class PlanTokenSlots(Pass):
    """Record in `ctx.facts.slots` how many slots there are."""

    requires = ("roles",)
    analysis = True

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassOutcome:
        """Read the options and the count."""
        bucket, capacity = ctx.env.config.token_bucket, ctx.env.config.token_capacity
        if capacity is not None:
            ctx.facts = replace(ctx.facts, slots=TokenSlots(capacity, None))
        elif bucket is not None and ctx.facts.roles is not None:
            try:
                count = _counted(ctx)
            except Declined as declined:
                return PassOutcome(False, {}, (declined.by(self.name),))
            ctx.facts = replace(ctx.facts, slots=TokenSlots(capacity_for(count, bucket), bucket))
        return PassOutcome(False, {"slots": ctx.facts.slots.capacity} if ctx.facts.slots else {})


def _counted(ctx: PassContext) -> int:
    """Return the number of output tokens.

    Raises:
        Declined: it is not known.
    """
    assert ctx.facts.roles is not None
    count = ctx.env.output_count
    if count is None:
        raise Declined(
            "graph",
            "token_bucket: nothing tells how many output tokens a batch has before the graph runs. Open "
            "token_roles(labels=...) around each step, with labels that are still on the CPU, or train with "
            "SparseLoRACallback",
        )
    if ctx.facts.roles.origin == "given":
        return count.causal
    if len(ctx.facts.roles.labels) > 1:
        reason = "token_bucket: the losses of this graph read several labels, whose output tokens cannot be told apart"
        raise Declined("graph", reason)
    if count.ignore_index != ctx.facts.roles.ignore_index:
        raise Declined(
            "graph",
            f"token_bucket: tokens were counted with ignore_index {count.ignore_index}, and the loss ignores "
            f"{ctx.facts.roles.ignore_index}",
        )
    return count.of(ctx.facts.roles.labels[0][1])
