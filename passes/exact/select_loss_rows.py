"""Compute the end of the model for the rows of the loss alone.

    %h = add(%residual, %attended)                     %rows = sparselora.loss_rows(%targets, -100)
    %n = norm(%h) ... ffn ... norm                     %h = add(select_rows(%residual), select_rows(%attended))
    %logits = linear(%n, W)                      ->    %n = norm(%h) ... ffn ... norm
    %loss = cross_entropy(%logits, %targets)           %logits = linear(%n, W)
    return %loss, %logits                              %loss = cross_entropy(%logits, %targets[%rows])
                                                       return %loss, %logits, %rows

A row whose target is `ignore_index` adds nothing to the loss and nothing to any gradient. So only the other rows enter
the cross-entropy, and the selection climbs from there through every call that keeps rows apart (`row_wise.py`) and that
nothing else reads: casts, the final norm, the last block's feed-forward layers with their adapters, its output
projection. It stops where a call mixes rows, or where a tensor is read for all of its rows; the rows are taken there.

Legal because: the mean and the sum of a cross-entropy leave ignored rows out, label smoothing and class weights
included, and the mean divides by what the others weigh. A batch without any row of the loss gives what it gave before:
NaN as a mean, 0 as a sum. Where sizes are fixed (the fact `slots`), `loss_slots` gives the rows: a spare slot has the
target that the loss ignores. Dropout on the way is drawn for all rows and then selected, so that the kept rows see the
numbers they would have seen. Logits that the graph returns leave it as R rows with their positions;
`compiler/outputs.py` puts them into a full tensor whose other rows are NaN, outside of AOTAutograd, where no gradient
of full size is made.

Declines when: `keep_logits` is set; the loss has no reduction, or there are two losses; the targets are not known
before the blocks; the logits, or any other tensor on the way, are read by something else that needs all rows, such as
an output (hidden states) beside the logits.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from sparse_compile.graph.declined import Declined
from sparse_compile.graph.facts import LossRows, NarrowedOutput, SitePlan, SparsityPlan, TokenSlots
from sparse_compile.graph.read import argument, set_argument, tensor_of
from sparse_compile.graph.rewrite import Rewriter, erase_unused, hoist, save_what_precedes
from sparse_compile.graph.sites import FFNSite
from sparse_compile.passes.context import PassContext
from sparse_compile.passes.protocol import Pass, PassOutcome
from sparse_compile.passes.read.loss_segment import LossSegment, find_loss_segment
from sparse_compile.passes.write.narrowed_rows import NarrowedRows
from sparse_compile.torch_private.fx import is_erased

_OPS = torch.ops.sparselora
ON_LOSS_ROWS = "runs on the rows of the loss alone, which are all output tokens"


class SelectLossRows(Pass):
    """Leave rows that the loss ignores out of the head, and of what comes before it for as long as rows keep apart."""

    requires = ("plan",)
    # The rows of the loss get slots as well.
    after = ("plan_token_slots",)
    optimises = True

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassOutcome:
        """Rewrite the graph in place."""
        if ctx.facts.loss_rows is not None:
            return PassOutcome(False)
        try:
            segment = find_loss_segment(gm.graph, ctx)
        except Declined as declined:
            return PassOutcome(False, {}, (declined.by(self.name),))
        stats = {"nodes": len(segment.places), "linears": segment.linears, "outputs": len(segment.outputs)}
        loss_rows = _narrow(Rewriter(gm, self.name), segment, ctx.facts.slots)
        plan = SparsityPlan(tuple(_without_segment(plan, segment.names) for plan in ctx.facts.plan.sites))
        ctx.facts = replace(ctx.facts, loss_rows=loss_rows, plan=plan)
        return PassOutcome(True, stats, segment.stops)


def _without_segment(plan: SitePlan, names: frozenset[str]) -> SitePlan:
    """Take what only rows of the loss run through out of the plan of a site: none of them is a context token."""
    touched = tuple(projection.base for projection in plan.site.projections if projection.base in names)
    if not plan.sparse or not touched:
        return plan
    if isinstance(plan.site, FFNSite):
        return SitePlan(plan.site, 0.0, plan.total, plan.total, ON_LOSS_ROWS)
    return replace(plan, without_context=touched)


def _narrow(rewriter: Rewriter, segment: LossSegment, slots: TokenSlots | None) -> LossRows:
    """Rewrite the graph; return what became of it."""
    loss = segment.loss
    top = next(node for node in rewriter.graph.nodes if node.op != "placeholder")
    narrowed = NarrowedRows(rewriter, segment.places, segment.operands, top, spare=slots is not None)
    target, ignored = argument(loss, "target"), argument(loss, "ignore_index", -100)
    value = tensor_of(target)
    with rewriter.before(top):
        targets = hoist(rewriter, target, narrowed.hoisted)
        op, sizes = _OPS.loss_rows.default, tuple[int | str, ...]()
        if slots is not None:
            op, sizes = _OPS.loss_slots.default, (slots.among(value.shape[0]), slots.option)
        rows = rewriter.call(op, targets, ignored, *sizes)
        kept = narrowed.picked(targets, rows, ignored)
    narrowed.run(rows)
    set_argument(loss, "target", kept)
    outputs = _add_outputs(narrowed, segment)
    # The first node may be a checkpoint's, whose marks these have taken over.
    save_what_precedes(top)
    erase_unused(target)
    # Roles are read from the labels by name: where only the copy is left, it is they.
    for node, copied in narrowed.hoisted.items():
        if is_erased(node):
            copied.name = node.name
    return LossRows(segment.names, outputs, slots is not None)


def _add_outputs(narrowed: NarrowedRows, segment: LossSegment) -> tuple[NarrowedOutput, ...]:
    """Return the positions of the rows beside the outputs that are narrowed."""
    returned = narrowed.rewriter.graph.output_node()
    leaves = list(returned.args[0]) if isinstance(returned.args[0], tuple | list) else []
    outputs = []
    for index, node in segment.outputs:
        place = segment.places[node]
        rows = narrowed.numbered(place.numbering)
        if rows not in leaves:
            leaves.append(rows)
        outputs.append(NarrowedOutput(index, leaves.index(rows), place.lead))
    if outputs:
        returned.args = (tuple(leaves),)
    return tuple(outputs)
