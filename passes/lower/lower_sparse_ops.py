"""Choose the provider that runs each sparse op.

    %y = sparselora.gathered_linear(%x, %w, %kept, 'reference')  ->  %y = sparselora.gathered_linear(%x, %w, %kept,
    'cpu_gemm')

Legal because: every provider of an op computes its reference body, up to rounding. The choice is per node, for its
device and dtype; what was passed over is recorded with its reason in the manifest.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from sparse_compile.graph.facts import Rejection
from sparse_compile.graph.vocabulary import TAG
from sparse_compile.kernels.providers import REFERENCE, Choice
from sparse_compile.kernels.tables import PROVIDERS
from sparse_compile.passes.context import PassContext, declined_providers
from sparse_compile.passes.protocol import Pass, PassOutcome


class LowerSparseOps(Pass):
    """Record in each sparse op the provider that runs it."""

    requires = ("predictors",)
    ensures = ("lowered",)
    # A provider is chosen for each op that is left.
    after = ("fuse_products", "fuse_scores", "fuse_adapted_layers")

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassOutcome:
        """Rewrite the graph in place."""
        stats: dict[str, int] = {}
        rejections: dict[Rejection, None] = {}
        used: dict[str, dict[str, None]] = {}
        calls = {plan.site.name: ctx.op_call(plan) for plan in ctx.facts.plan.split_sites}
        changed = False
        for node in gm.graph.nodes:
            table = PROVIDERS.get(node.target)
            if table is None:
                continue
            site = node.meta[TAG]["site"]
            if site not in calls:
                continue  # of no sparse site: the pass that inserted it chose
            choice = table.choose(calls[site], ctx.env.config.kernels)
            node.kwargs = {**node.kwargs, "provider": choice.provider}
            changed = True
            if choice == Choice(REFERENCE, ()):
                continue  # this device has no other, so nothing was chosen
            stats[choice.provider] = stats.get(choice.provider, 0) + 1
            used.setdefault(site, {})[choice.provider] = None
            rejections |= declined_providers(self.name, table.op, choice)
        ctx.results = replace(ctx.results, providers={site: tuple(names) for site, names in used.items()})
        return PassOutcome(changed, stats, tuple(rejections))
