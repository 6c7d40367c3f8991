"""What the user is told of pruned layers while they train, and what ties a compiled graph to their weights."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor, fx

from sparse_compile.compiler.report import summary_of
from sparse_compile.passes.context import PassContext
from sparse_compile.passes.requested.preserve_weight_mask import adapted_projections
from sparse_compile.torch_private.autograd import write_count
from sparse_compile.torch_private.dynamo import install_identity_guards
from sparse_compile.training.session import Session

_RULE = "preserve_weight_mask"


def guard_masks(gm: fx.GraphModule, ctx: PassContext) -> None:
    """Have Dynamo compile anew where a weight whose zeros were counted is replaced, or belongs to another model."""
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
    versions = _versions(ctx)
    runs = 0

    def run(*args: Any) -> Any:
        nonlocal runs
        runs += 1
        if runs == 2:
            # All graphs of a training step have been compiled by now.
            _tell_if_none(session)
        _tell_if_written(versions, session)
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


def _versions(ctx: PassContext) -> list[tuple[str, weakref.ref[Tensor], int]]:
    """Return, of each weight whose zeros were counted, its name and how often it had been written to."""
    values = {each.name: ctx.env.parameters[each.weight].value for each in adapted_projections(ctx)}
    return [
        (name, weakref.ref(value), count)
        for name, value in values.items()
        if value is not None and (count := write_count(value)) is not None
    ]


def _tell_if_written(versions: list[tuple[str, weakref.ref[Tensor], int]], session: Session) -> None:
    """Warn once where a weight has other values than those its zeros were counted in."""
    written = [name for name, weight, version in versions if (w := weight()) is not None and write_count(w) != version]
    if written and session.once((_RULE, "written")):
        warnings.warn(
            f"sparselora: {len(written)} weights were written to after their zeros were counted ({written[0]} among "
            "them). Masked layers keep the zeros that there are now, in each step; which layers are masked was decided "
            "by the zeros that there were. Call torch._dynamo.reset() to have them counted again.",
            stacklevel=3,
        )
