"""What the user is told of pruned layers while they train, and what ties a compiled graph to their weights."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any, Final

from torch import fx

from sparse_compile.compiler.report_words import summary_of
from sparse_compile.compiler.weight_watch import StoredWeight
from sparse_compile.kernels.masked_linear.pattern import zero_fraction
from sparse_compile.passes.context import PassContext
from sparse_compile.passes.requested.preserve_weight_mask import adapted_projections
from sparse_compile.predictor.weight_state import WeightWatch
from sparse_compile.torch_private.autograd import running_backward
from sparse_compile.torch_private.dynamo import install_identity_guards, install_value_guard
from sparse_compile.training.news import say
from sparse_compile.training.session import Session

_RULE = "preserve_weight_mask"

TURNS: Final[Counter[int]] = Counter()
"""By the id of a session, how often layers of its model became pruned, or ceased to be, under a compiled graph. Graphs
with masks are guarded on it."""


def guard_masks(gm: fx.GraphModule, ctx: PassContext, session: Session | None) -> None:
    """Have Dynamo compile anew where zeros are to be counted anew.

    That is where a weight whose zeros were counted is replaced or belongs to another model, and where so many zeros
    came or went that another layer counts as pruned.

    Args:
        gm: a captured graph.
        ctx: its facts.
        session: of its model; None where nothing of it is trained.
    """
    if session is not None:
        TURNS[session.id] += 0
        install_value_guard(__name__, "TURNS", session.id)
    counted = {projection.weight for projection in adapted_projections(ctx)}
    install_identity_guards(node for node in gm.graph.nodes if node.op == "placeholder" and node.name in counted)


def watching_masks(
    compiled: Callable[..., Any], ctx: PassContext, session: Session, *, whole_step: bool
) -> Callable[..., Any]:
    """Tell once of pruned layers without a mask, of a model without any, and of weights that are written to.

    Args:
        compiled: a compiled training graph.
        ctx: its facts.
        session: the model's, which has the graph's report already.
        whole_step: whether no other graph of the model can hold more layers.
    """
    tell_unmasked(ctx, session.once)
    if whole_step:
        _tell_if_none(session)
    projections = {each.name: each for each in adapted_projections(ctx)}
    pruned = {layer.projection for layer in ctx.facts.masked_layers}
    weights = {name: StoredWeight.of(each, ctx) for name, each in projections.items()}
    watch = WeightWatch({name: weight.tensors() for name, weight in weights.items()})
    threshold = ctx.env.config.mask_threshold
    runs = 0

    def run(*args: Any) -> Any:
        nonlocal runs
        runs += 1
        if runs == 2:
            # All graphs of a training step have been compiled by now.
            _tell_if_none(session)
        if running_backward() is None and (changed := watch.changed()):
            now = {name for name in changed if zero_fraction(weights[name].dense()) >= threshold}
            _tell_of_change(changed, now ^ (pruned & changed), session)
        return compiled(*args)

    return run


def tell_unmasked(ctx: PassContext, once: Callable[[Hashable], bool]) -> None:
    """Warn of the pruned layers of a graph that have no mask, each named with its reason.

    Args:
        ctx: the graph's facts.
        once: says whether a layer is mentioned for the first time.
    """
    declined = {layer.projection: layer.reason for layer in ctx.facts.masked_layers if layer.reason}
    lines = [f"  {name}: {reason}" for name, reason in declined.items() if once((_RULE, name))]
    if lines:
        head = "sparselora: pruned layers whose adapters have no mask, so that a merge fills their zeros:"
        warnings.warn("\n".join([head, *lines]), stacklevel=2)


def _tell_if_none(session: Session) -> None:
    reports = session.reports
    if any(report.masks for report in reports) or not session.once((_RULE, "none")):
        return
    declined = tuple(each for report in reports for each in report.rejections if each.rule == _RULE)
    reasons = summary_of(declined, most=6) or ["  there is no frozen linear layer with an adapter"]
    head = "sparselora: preserve_weight_mask found no pruned layer with an adapter, so nothing is masked:"
    warnings.warn("\n".join([head, *reasons]), stacklevel=2)


def _tell_of_change(changed: frozenset[str], turned: set[str], session: Session) -> None:
    """Say that weights with counted zeros hold other values, and have the next step compiled anew where that matters.

    Args:
        changed: the layers.
        turned: those that were pruned and are no more, or that became so.
        session: of their model.
    """
    if not turned:
        say(
            f"{len(changed)} weights changed after their zeros were counted ({min(changed)} among them). The same "
            "layers are pruned: they keep the zeros that there are now"
        )
        return
    TURNS[session.id] += 1
    warnings.warn(
        f"sparselora: {len(turned)} layers became pruned, or ceased to be, after their zeros were counted "
        f"({min(turned)} among them). This step is computed as before; the next one is compiled anew, by the zeros "
        "that there are now.",
        stacklevel=3,
    )
