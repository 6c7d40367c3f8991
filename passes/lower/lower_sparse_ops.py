"""Choose the provider that runs each sparse op.

    %y = sparselora.gathered_linear(%x, %w, %kept, 'reference')  ->  %y = sparselora.gathered_linear(%x, %w, %kept,
    'cpu_gemm')

Legal because: every provider of an op computes its reference body, up to rounding. The choice is per node, for its
device and dtype; what was passed over is recorded with its reason in the manifest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from sparse_compile.graph.facts import Rejection
from sparse_compile.graph.vocabulary import TAG
from sparse_compile.kernels.channel_selection import PREDICTED_NORMS, PREDICTED_SCORES, TOP_CHANNELS
from sparse_compile.kernels.fused_linear import FUSED_LINEAR
from sparse_compile.kernels.gathered_linear import GATHERED_INPUT_LINEAR, GATHERED_LINEAR
from sparse_compile.kernels.providers import REFERENCE, Choice, ProviderTable
from sparse_compile.kernels.token_rows import PUT_ROWS, TAKE_ROWS
from sparse_compile.passes.context import PassContext, declined_providers
from sparse_compile.passes.protocol import Numerics, PassOutcome

_OPS = torch.ops.sparselora
_TABLES: dict[object, ProviderTable] = {
    _OPS.take_rows.default: TAKE_ROWS,
    _OPS.put_rows.default: PUT_ROWS,
    _OPS.gathered_linear.default: GATHERED_LINEAR,
    _OPS.gathered_input_linear.default: GATHERED_INPUT_LINEAR,
    _OPS.fused_linear.default: FUSED_LINEAR,
    _OPS.predicted_norms.default: PREDICTED_NORMS,
    _OPS.predicted_scores.default: PREDICTED_SCORES,
    _OPS.top_channels.default: TOP_CHANNELS,
}


@dataclass(frozen=True)
class LowerSparseOps:
    """Record in each sparse op the provider that runs it."""

    name: str = "lower_sparse_ops"
    requires: tuple[str, ...] = ("predictors",)
    ensures: tuple[str, ...] = ("lowered",)
    numerics: Numerics = Numerics.EXACT
    analysis: bool = False
    optimises: bool = False

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassOutcome:
        """Rewrite the graph in place."""
        stats: dict[str, int] = {}
        rejections: dict[Rejection, None] = {}
        used: dict[str, dict[str, None]] = {}
        calls = {plan.site.name: ctx.op_call(plan) for plan in ctx.plan.sparse_sites}
        for node in gm.graph.nodes:
            table = _TABLES.get(node.target)
            if table is None:
                continue
            site = node.meta[TAG]["site"]
            if site not in calls:
                continue  # of no sparse site: the pass that inserted it chose
            choice = table.choose(calls[site], ctx.config.kernels)
            if choice == Choice(REFERENCE, ()):
                continue  # what the op runs anyway: there is no other for this device
            node.kwargs = {**node.kwargs, "provider": choice.provider}
            stats[choice.provider] = stats.get(choice.provider, 0) + 1
            used.setdefault(site, {})[choice.provider] = None
            rejections |= declined_providers(self.name, table.op, choice)
        ctx.providers = {site: tuple(names) for site, names in used.items()}
        return PassOutcome(bool(stats), stats, tuple(rejections))
