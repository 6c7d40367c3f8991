"""Say why a site is dense of which nothing was asked, and where a rule looked and did not apply."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from sparse_compile.graph.facts import Rejection, SitePlan
from sparse_compile.options.presets import match_site, preset_sparsity
from sparse_compile.passes.context import PassContext
from sparse_compile.torch_private.dynamo import module_of

__all__ = ["KINDS", "places_of", "why_not_asked"]

KINDS = {"ffn": "feed-forward", "attention": "attention"}
"""Kinds of sites, in words."""


def why_not_asked(plan: SitePlan, ctx: PassContext) -> str:
    """Return why the options ask for no sparsity at a site that stays dense.

    Args:
        plan: of the site, without a reason of its own.
        ctx: what the passes found.
    """
    config, site = ctx.env.config, plan.site
    if config.site_sparsity is not None:
        named = [pattern for pattern in config.site_sparsity if match_site(pattern, site.name)]
        if not named:
            return f"{config.site_option} does not name it"
        wanted = config.site_sparsity[max(named, key=len)]
        return _too_few(wanted, plan) if wanted else f"{config.site_option} keeps it dense"
    preset = config.preset
    if preset in ("none", "exact"):
        return f"preset {preset!r} keeps every site dense"
    position, graphs = ctx.env.stack
    in_graph = len(ctx.facts.ffn_sites) if site.kind == "ffn" else len(ctx.facts.attention_sites)
    index, count = position * in_graph + site.index, graphs * in_graph
    if index == 0:
        return "first block, always dense"
    if preset == "auto":
        return "preset 'auto' leaves attention dense in the blocks that context runs through"
    if index == count - 1:
        return "last block, always dense"
    asked = [block for block in range(count) if preset_sparsity(preset, site.kind, block, count)]
    if index in asked:
        return _too_few(preset_sparsity(preset, site.kind, index, count), plan)
    if not asked:
        return f"the model has too few blocks for {KINDS[site.kind]} sparsity by preset {preset!r}"
    return f"preset {preset!r} has {KINDS[site.kind]} sparsity in blocks {asked[0]} to {asked[-1]} of {count}"


def _too_few(sparsity: float, plan: SitePlan) -> str:
    return f"a sparsity of {sparsity:g} is less than one of its {plan.total} channels"


def places_of(
    rejections: Iterable[Rejection], graphs: Iterable[fx.GraphModule], ctx: PassContext, path: str
) -> dict[str, str]:
    """Return where in the model the nodes stand that rejections name; what has no place there is left out.

    Args:
        rejections: whose nodes are looked up.
        graphs: where to look, the first one that has a node decides.
        ctx: what the passes found.
        path: where in the model the captured part stands; empty for a whole model.
    """
    layers = {projection.base: projection.name for projection in ctx.facts.projections.values()}
    known = {*layers.values(), *(site.name for site in ctx.facts.sites)}
    wanted = {rejection.node for rejection in rejections} - known
    places = {name: layers[name] for name in wanted & layers.keys()}
    for graph in graphs:
        for node in graph.graph.nodes:
            if node.name in wanted and node.name not in places and (module := module_of(node)):
                places[node.name] = f"{path}.{module}" if path else module
    return dict(sorted(places.items()))
