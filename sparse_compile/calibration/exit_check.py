"""Ask the passes of a training step whether context can leave: its graph is another one than an evaluation's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sparse_compile.calibration.taps import TappedModel
from sparse_compile.compiler.explain import explain

__all__ = ["why_context_stays"]

_RULES = ("plan_sparsity.exit", "exit_context")
"""Who declines an exit."""


def why_context_stays(tapped: TappedModel, batch: Mapping[str, Any]) -> str:
    """Return why context cannot leave in a training step; empty where it can. Nothing is computed.

    Args:
        tapped: The model, with exits; of them the first block is asked for, so that the later ones can be left as well.
        batch: What a training step passes to it.
    """
    earliest = list(tapped.exits)[-1]
    blocks = [*tapped.attention]
    depth = (1 + blocks.index(earliest)) / (1 + len(blocks))
    options = replace(tapped.config, preset="o1", layer_sparsity={}, recipe=None, context_exit=depth, dense_every=None)
    report = explain(tapped.model, config=options, **batch)
    if any(site.left for graph in report.graphs for site in graph.sites):
        return ""
    reasons = [each.reason for graph in report.graphs for each in graph.rejections if each.rule in _RULES]
    return reasons[0] if reasons else "no training step with its loss was captured"
