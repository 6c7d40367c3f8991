"""Decide for every matched site whether it becomes sparse and how many channels it keeps.

    sites + roles + options + cost model  ->  plan (per site: sparsity, channels kept, reason where it stays dense)

A recipe says of each site that a map stands in its place for context tokens, or which fraction of its channels is left
out. A site named in a recipe or in `layer_sparsity` is never declined for cost; a preset's site is, where the predictor
and the movement of tokens cost more than the products they save. The predictor's factors are computed here, so that a
weight that has none (NaN, infinite) leaves its site dense with its name in the reason. Sites that context tokens have
left before (`context_exit`) are planned as such, whatever else is asked of them.

Declines a site when: nothing tells the roles of its tokens, its tokens are not those of the labels, one of its weights
is trained or not finite, or (presets) it does not pay. A map that was fitted for other weights is an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from sparse_compile.graph.cost import gain, map_gain
from sparse_compile.graph.cost_note import cost_note
from sparse_compile.graph.declined import Declined
from sparse_compile.graph.facts import Rejection, SitePlan, SparsityPlan
from sparse_compile.graph.read import hinted_shape, nodes_by_name
from sparse_compile.graph.sites import AttentionSite, FFNSite, Projection, Site
from sparse_compile.kernels.dtypes import at_least_fp32
from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.options.presets import AUTO_RANK, exit_block, kept_count, match_site, preset_sparsity
from sparse_compile.options.recipe import AffineMap, SiteRecipe
from sparse_compile.passes.context import PassContext
from sparse_compile.passes.protocol import InvalidOptionError, Pass, PassOutcome
from sparse_compile.passes.read.exit_sites import sites_behind_exit
from sparse_compile.passes.read.token_space import token_space
from sparse_compile.predictor.published import load_upstream_factors
from sparse_compile.predictor.store import FactorStore
from sparse_compile.predictor.svd import LowRankFactors
from sparse_compile.predictor.weight_state import fingerprint
from sparse_compile.training.progress import stage


class PlanSparsity(Pass):
    """Decide what is to be done with each site (`plan`), and compute the factors of its predictor (`factors`)."""

    requires = ("ffn", "attention", "roles")
    ensures = ("plan",)
    analysis = True

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassOutcome:
        """Read the graph's facts."""
        nodes = nodes_by_name(gm.graph)
        rejections: list[Rejection] = []
        space = token_space(gm.graph, ctx.facts.roles) if ctx.facts.roles else set()
        planner = _Planner(ctx, _token_shape(nodes, ctx), space, _factor_store(ctx.env.config))
        try:
            planner.let_context_leave(gm.graph)
        except Declined as declined:
            rejections.append(declined.by(f"{self.name}.exit"))
        plans = []
        for number, site in enumerate(sorted(ctx.facts.sites, key=lambda site: _position(gm.graph, site)), 1):
            stage(f"plans {site.name}, site {number} of {len(ctx.facts.sites)}")
            plan = planner.plan(site, hinted_shape(nodes[site.source]))
            if not plan.sparse and plan.reason:
                rejections.append(Rejection(self.name, site.name, plan.reason))
            plans.append(plan)
        decided = SparsityPlan(tuple(plans))
        ctx.facts = replace(ctx.facts, plan=decided, factors=planner.factors, surrogates=planner.surrogates)
        sparse = len(ctx.facts.plan.sparse_sites)
        return PassOutcome(False, {"sparse": sparse, "dense": len(plans) - sparse}, tuple(rejections))


def requested_sparsity(site: Site, ctx: PassContext) -> tuple[float, bool]:
    """Return the sparsity the options ask for at a site, and whether they name it."""
    config = ctx.env.config
    if config.layer_sparsity is not None:
        matches = [pattern for pattern in config.layer_sparsity if match_site(pattern, site.name)]
        # The longest suffix is the most specific one.
        return (config.layer_sparsity[max(matches, key=len)], True) if matches else (0.0, False)
    position, graphs = ctx.env.stack
    count = len(ctx.facts.ffn_sites) if site.kind == "ffn" else len(ctx.facts.attention_sites)
    return preset_sparsity(config.preset, site.kind, position * count + site.index, graphs * count), False


def weights_fingerprint(sites: Iterable[Site], ctx: PassContext) -> str:
    """Return what tells the frozen weights of some sites from those of others."""
    return fingerprint(ctx.frozen_weight(projection) for site in sites for projection in site.projections)


def _position(graph: fx.Graph, site: Site) -> int:
    base = site.output.base
    return next(position for position, node in enumerate(graph.nodes) if node.name == base)


def _token_shape(nodes: dict[str, fx.Node], ctx: PassContext) -> tuple[int, ...] | None:
    """Return the (B, S) of the labels, or None where the roles are given from outside."""
    if ctx.facts.roles is None or not ctx.facts.roles.labels:
        return None
    return hinted_shape(nodes[ctx.facts.roles.labels[0][0]])


def _factor_store(config: SparseLoRAConfig) -> FactorStore:
    try:
        upstream = load_upstream_factors(config.predictor_path) if config.predictor_path else None
    except ValueError as error:
        raise InvalidOptionError(f"predictor_path: {error}") from error
    return FactorStore(None, config.predictor_rank, config.seed, upstream)


def factors_of(projection: Projection, weight: Tensor, store: FactorStore) -> LowRankFactors:
    """Return the predictor's factors of a layer, or of its part of a fused one.

    Args:
        projection: the layer.
        weight: as it is stored, (out, in) or transposed.
        store: where they come from.

    Raises:
        ValueError: the weight has no factors.
    """
    with torch.no_grad():
        rows = weight.t() if projection.transposed else weight
        rows = rows if projection.fused is None else projection.fused.take(rows)
        return store.get(projection.name, rows)


def _alike(one: AffineMap, other: AffineMap) -> bool:
    """Tell whether two maps have factors of one shape, dtype and device."""
    return all(
        (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) for a, b in ((one.q, other.q), (one.u, other.u))
    )


def _empty_map(width: int, out: int) -> AffineMap:
    """Return a map of zeros of the rank that a run fits."""
    rank = max(1, min(AUTO_RANK, width // 4, out // 4))
    return AffineMap(torch.zeros(rank, width), torch.zeros(out, rank), torch.zeros(out))


def _entry(sites: Mapping[str, SiteRecipe], site: Site) -> SiteRecipe | None:
    """Return what a recipe says of a site, under the longest name that matches; None where it says nothing."""
    names = [name for name in sites if match_site(name, site.name)]
    return sites[max(names, key=len)] if names else None


class _Planner:
    def __init__(
        self,
        ctx: PassContext,
        token_shape: tuple[int, ...] | None,
        space: set[str],
        store: FactorStore,
    ) -> None:
        self.ctx = ctx
        self.token_shape = token_shape
        self.space = space
        self.store = store
        self.left: set[str] = set()
        self.online = ctx.env.config.dense_period is not None  # whether the run fits maps
        self.recipe = ctx.env.config.recipe
        self.factors: dict[str, LowRankFactors] = {}
        self.surrogates: dict[str, AffineMap] = {}

    def let_context_leave(self, graph: fx.Graph) -> None:
        """Find the sites that context tokens leave before, if the options want any, and the maps of the blocks behind.

        Raises:
            Declined: context cannot leave this graph.
            InvalidOptionError: a recipe has no map for a block, or one that does not fit.
        """
        blocks = self.ctx.facts.attention_sites
        block = self._exit_block()
        # A block that is compiled alone has none behind it: that is no reason to say nothing.
        in_parts = self.ctx.env.stack != (0, 1) and self.ctx.env.config.exit_depth < 1
        if block == len(blocks) and not in_parts:
            return
        nodes = nodes_by_name(graph)
        sites = sites_behind_exit(graph, self.ctx, block)
        for site in sites:
            self._check_tokens(site, hinted_shape(nodes[site.source]))
        maps = {site: self._exit_map(site, sites) for site in blocks[block + 1 :]}
        for site, surrogate in maps.items():
            self._set_map(site, surrogate)
        self.left = {site.identity for site in sites}

    def _exit_block(self) -> int:
        """Return the attention block before which context leaves; their number where it stays."""
        blocks = self.ctx.facts.attention_sites
        if self.recipe is None or self.recipe.exit is None:
            return exit_block(self.ctx.env.config.exit_depth, len(blocks))
        wanted = self.recipe.exit.site
        return next((place for place, site in enumerate(blocks) if match_site(wanted, site.name)), len(blocks))

    def _exit_map(self, site: AttentionSite, left: Sequence[Site]) -> AffineMap:
        """Return the map of a block behind the exit: of a recipe, or one of zeros until the run fits it."""
        width = site.query.in_features
        if self.recipe is None or self.recipe.exit is None:
            return _empty_map(width, width)
        wanted = _entry(self.recipe.exit.maps, site)
        if wanted is None or wanted.surrogate is None:
            raise InvalidOptionError(
                f"recipe: context leaves before {self.recipe.exit.site}, and there is no map for {site.name}"
            )
        self._check_fit(site, wanted, wanted.surrogate, (width, width), left[: left.index(site)])
        return wanted.surrogate

    def plan(self, site: Site, source_shape: tuple[int, ...]) -> SitePlan:
        """Return what is to be done with `site`.

        Raises:
            InvalidOptionError: a recipe has a map for it that does not fit.
        """
        total = site.channels
        if site.identity in self.left:
            return self._left(site)
        if self._fits_in_the_run(site):
            return self._online(site, source_shape)
        wanted = None if self.recipe is None else _entry(self.recipe.sites, site)
        if wanted is not None and wanted.surrogate is not None:
            return self._mapped(site, wanted, wanted.surrogate, source_shape)
        if self.recipe is None:
            sparsity, named = requested_sparsity(site, self.ctx)
        else:
            sparsity, named = (0.0, False) if wanted is None else (wanted.sparsity, True)
        kept = kept_count(total, sparsity)
        if kept == total:
            return SitePlan(site, 0.0, total, total)
        try:
            self._check_tokens(site, source_shape)
            note = self._cost_note(site, kept, math.prod(source_shape[:-1]), named=named)
            self._compute_factors(site)
        except Declined as declined:
            return SitePlan(site, 0.0, total, total, declined.reason)
        return SitePlan(site, sparsity, kept, total, note)

    def _left(self, site: Site) -> SitePlan:
        """Plan a site that context tokens have left before: a feed-forward block, or attention of the rest to them."""
        if isinstance(site, FFNSite):
            return SitePlan(site, 1.0, 0, site.channels, left=True)
        mapped = site.identity in self.surrogates
        online = mapped and self.online
        return SitePlan(site, 0.0, site.channels, site.channels, mapped=mapped, online=online, left=True)

    def _mapped(self, site: Site, wanted: SiteRecipe, surrogate: AffineMap, source_shape: tuple[int, ...]) -> SitePlan:
        """Plan a map in the place of a block.

        Raises:
            InvalidOptionError: the map was not fitted for this block.
        """
        if not isinstance(site, FFNSite):
            raise InvalidOptionError(
                f"recipe: a map stands in the place of a feed-forward block, and {site.name} is none"
            )
        shape = (site.inputs[0].in_features, site.output.out_features)
        try:
            self._check_fit(site, wanted, surrogate, shape, [site])
        except Declined as declined:
            return SitePlan(site, 0.0, site.channels, site.channels, declined.reason)
        return self._with_map(site, surrogate, source_shape)

    def _check_fit(
        self,
        site: Site,
        wanted: SiteRecipe,
        surrogate: AffineMap,
        shape: tuple[int, int],
        imitated: Sequence[Site],
    ) -> None:
        """Check that a recipe's map has the widths of its place, and was fitted to the weights that it stands for.

        Raises:
            Declined: the weights have changed in the run.
            InvalidOptionError: it is of another model.
        """
        if (surrogate.q.shape[1], surrogate.u.shape[0]) != shape:
            sizes = f"{surrogate.q.shape[1]} to {surrogate.u.shape[0]} features, and the block {shape[0]} to {shape[1]}"
            raise InvalidOptionError(f"recipe: the map of {site.name} goes from {sizes}: it is of another model")
        # A map that the run fits follows its weights: those that it had at the start count no more.
        follows = self.online and site.identity in self.ctx.env.online_maps
        if not wanted.weights or follows or wanted.weights == weights_fingerprint(imitated, self.ctx):
            return
        if self.ctx.env.maps_are_stale:
            raise Declined(site.name, "its frozen weights changed in the run, and the recipe's map is of the old ones")
        raise InvalidOptionError(
            f"recipe: the map of {site.name} was fitted for other weights than this model has. Calibrate it anew, "
            "or leave the site out (Recipe.without)"
        )

    def _fits_in_the_run(self, site: Site) -> bool:
        """Tell whether a map is to be fitted to a site in the run, by preset `auto`."""
        config = self.ctx.env.config
        if config.preset != "auto" or config.site_option or not isinstance(site, FFNSite):
            return False
        position, _ = self.ctx.env.stack
        return position + site.index > 0

    def _online(self, site: Site, source_shape: tuple[int, ...]) -> SitePlan:
        """Plan a map that the run fits: one of zeros until then."""
        assert isinstance(site, FFNSite)
        width, out = site.inputs[0].in_features, site.output.out_features
        empty = _empty_map(width, out)
        dtype, device = self.ctx.weight_kind(site.output)
        estimate = map_gain(site, empty.rank, dtype.itemsize, device)
        if not estimate.pays:
            return SitePlan(site, 0.0, site.channels, site.channels, cost_note(estimate.saved, estimate.spent))
        return self._with_map(site, empty, source_shape)

    def _with_map(self, site: FFNSite, surrogate: AffineMap, source_shape: tuple[int, ...]) -> SitePlan:
        """Plan a map in the place of a block."""
        try:
            self._check_tokens(site, source_shape)
        except Declined as declined:
            return SitePlan(site, 0.0, site.channels, site.channels, declined.reason)
        self._set_map(site, surrogate)
        return SitePlan(site, 1.0, 0, site.channels, mapped=True, online=self.online)

    def _set_map(self, site: Site, surrogate: AffineMap) -> None:
        """Put the map of a site into buffers: those that the run fits, where another graph of the model has them."""
        dtype, device = self.ctx.weight_kind(site.output)[0], self.ctx.weight_device(site.output)
        parts = (each.to(device, dtype, copy=True) for each in (surrogate.q, surrogate.u, surrogate.bias))
        buffers = AffineMap(*parts)
        known = self.ctx.env.online_maps.get(site.identity) if self.online else None
        self.surrogates[site.identity] = buffers if known is None or not _alike(known, buffers) else known

    def _cost_note(self, site: Site, kept: int, tokens: int, *, named: bool) -> str:
        """Return a note for a named site that does not pay; empty if it pays.

        Raises:
            Declined: it does not pay and the options do not name it.
        """
        dtype, device = self.ctx.weight_kind(site.output)
        estimate = gain(site, kept, self.ctx.env.config.predictor_rank, dtype.itemsize, device, tokens)
        if estimate.pays:
            return ""
        note = cost_note(estimate.saved, estimate.spent)
        if not named:
            raise Declined(site.name, note)
        return note

    def _check_tokens(self, site: Site, source_shape: tuple[int, ...]) -> None:
        """Decline a site of whose tokens the roles say nothing."""
        if self.ctx.facts.roles is None:
            raise Declined(site.name, "nothing tells output tokens from context")
        if site.source not in self.space:
            raise Declined(site.name, "the loss is computed for other tokens than this site's")
        tokens = source_shape[:-1]
        if self.token_shape is None:
            if len(tokens) != 2:
                raise Declined(site.name, "its tokens have no (batch, sequence) shape for the given roles")
        elif tokens not in (self.token_shape, (self.token_shape[0] * self.token_shape[1],)):
            raise Declined(site.name, f"its tokens {tokens} are not those of the labels {self.token_shape}")

    def _compute_factors(self, site: Site) -> None:
        """Compute the predictor's factors; decline a site whose weights have none."""
        for projection in site.projections:
            weight = self.ctx.frozen_weight(projection)
            # A sum is finite exactly when no term is NaN or infinite, short of overflow: fp32 sums of a bf16 weight.
            if not bool(torch.isfinite(weight.sum(dtype=at_least_fp32(weight)))):
                raise Declined(site.name, f"the weight of {projection.name} is not finite")
        found = {}
        for projection in site.predicted:
            try:
                found[projection.name] = factors_of(projection, self.ctx.frozen_weight(projection), self.store)
            except ValueError as error:
                raise Declined(site.name, f"no predictor: {error}") from error
        self.factors.update(found)
