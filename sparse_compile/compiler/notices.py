"""What the backend tells its users, once each: what was asked for and is not there, why, and what to do about it."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable

from torch import fx, nn

from sparse_compile.compiler.capture import is_whole_step
from sparse_compile.compiler.peft_support import are_disabled
from sparse_compile.compiler.pipeline import PASSES
from sparse_compile.compiler.report import GraphReport
from sparse_compile.compiler.report_words import ALL_TRAINED, counted_adapters, summary_of
from sparse_compile.graph.cost_note import is_cost_note
from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.options.presets import match_site
from sparse_compile.passes.context import PassContext
from sparse_compile.torch_private.dynamo import frame_key, graphs_of_frame, recompile_limit
from sparse_compile.training.session import Session
from sparse_compile.training.told import IN_PROCESS

_matched: set[SparseLoRAConfig] = set()
"""Configurations with which some graph became sparse. A model in several graphs may be several sessions, which only
their configuration ties together until an optimizer steps."""


def asks_for_sparsity(config: SparseLoRAConfig) -> bool:
    """Tell whether any site may become sparse."""
    if config.exit_depth < 1:
        return True
    if config.site_sparsity is not None:
        return any(config.site_sparsity.values())
    return config.preset in ("o1", "o2", "auto")


def tell_about_sites(
    gm: fx.GraphModule, ctx: PassContext, session: Session, report: GraphReport, *, failed: bool
) -> None:
    """Warn, once each, about what was asked for and is not there."""
    config = ctx.env.config
    session.add_site_names(site.name for site in ctx.facts.sites)
    if config.site_sparsity is not None:
        session.expect_sites(config.site_sparsity)
        if is_whole_step(gm, ctx):
            session.check_sites_now()
    _tell_about_exit(session, report, config)
    if any(site.sparse for site in report.sites):
        _matched.add(config)
        _tell_declined(session, report)
    elif failed:
        session.once("nothing matched")  # the pipeline has said why
    elif is_whole_step(gm, ctx):
        _tell_if_nothing_matched(session, config)


def _tell_about_exit(session: Session, report: GraphReport, config: SparseLoRAConfig) -> None:
    """Warn once where context was asked to leave and does not."""
    wanted = config.recipe.exit if config.recipe is not None else None
    asked = wanted is not None or (config.context_exit is not None and config.context_exit < 1)
    if not asked or any(site.left for site in report.sites):
        return
    rules = ("plan_sparsity.exit", "exit_context")
    reasons = [f"{each.node}: {each.reason}" for each in report.rejections if each.rule in rules]
    if reasons and session.once(("context stays", reasons[0])):
        warnings.warn(
            f"sparselora: context tokens do not leave the residual stream, as context_exit asks for ({reasons[0]})",
            stacklevel=2,
        )


def _tell_declined(session: Session, report: GraphReport) -> None:
    """Warn once of the sites of a graph that were asked for and stay dense, where others are sparse.

    Silent where a preset's site does not pay: to choose is the cost model's job, and `explain` shows what it chose.
    """
    dense = [site for site in report.sites if not site.sparse and site.provider == "dense"]
    sites = {site.name: site.reason for site in dense if site.reason and not is_cost_note(site.reason)}
    lines = [f"  {name}: {reason}" for name, reason in sites.items() if session.once(("declined", name))]
    if lines:
        if not report.roles:
            roles = (each for each in report.rejections if each.rule == "trace_roles")
            lines += summary_of(roles, most=2, places=report.places)
        warnings.warn("\n".join(["sparselora: sites that were asked for stay dense:", *lines]), stacklevel=2)


def tell_about_slots(session: Session, report: GraphReport) -> None:
    """Warn where a graph was to have fixed sizes and has none."""
    for rejection in report.rejections:
        if rejection.rule == "plan_token_slots" and session.once((rejection.rule, rejection.reason)):
            reason = f"{rejection.reason}. Until then sizes depend on data, which waits for the device"
            warnings.warn(f"sparselora: {reason}", stacklevel=2)


def tell_when_all_is_compiled(session: Session, report: GraphReport, config: SparseLoRAConfig) -> None:
    """Warn of what only the last graph of a training step can settle: no part of the model has what was asked for."""
    if config in _matched:
        _tell_declined(session, report)
    else:
        _tell_if_nothing_matched(session, config)


def _tell_if_nothing_matched(session: Session, config: SparseLoRAConfig) -> None:
    """Warn once where sparsity was asked for and no graph of the model has a sparse site."""
    graphs: list[GraphReport] = session.reports
    matched = any(site.sparse for graph in graphs for site in graph.sites)
    if matched or not asks_for_sparsity(config) or not session.once("nothing matched"):
        return
    wanted = config.site_option or f"preset {config.preset!r}"
    kinds = Counter(site.kind for graph in graphs for site in graph.sites)
    roles = sorted({graph.roles for graph in graphs if graph.roles})
    # What an exact pass leaves alone is no reason for a site to stay dense.
    optimising = {each.name for each in PASSES if each.optimises}
    declined = (rejection for graph in graphs for rejection in graph.rejections)
    places = {node: place for graph in graphs for node, place in graph.places.items()}
    reasons = summary_of((each for each in declined if each.rule not in optimising), most=6, places=places)
    if graphs and all(graph.all_trained for graph in graphs):
        reasons = [f"  {ALL_TRAINED}"]
    skipped = {
        each.record.name: each.record.skipped for graph in graphs for each in graph.passes if each.record.skipped
    }
    reasons += [f"  {name}: {reason}" for name, reason in skipped.items()]
    if kinds and not reasons:
        if _names_no_site(config, graphs):
            return  # the warning of these names lists the sites that are there: this one knows no more
        reasons = [f"  {wanted} asks for no sparsity at any site: the model is too shallow or too narrow for it"]
    counts = (sum(graph.adapters for graph in graphs), sum(graph.frozen_adapters for graph in graphs))
    adapters = counted_adapters(*counts)
    layers = f"{sum(graph.projections for graph in graphs)} frozen linear layers with {adapters}"
    found = (
        f"{layers}, {kinds['ffn']} feed-forward and "
        f"{kinds['attention']} attention blocks, token roles from {' and '.join(roles) or 'nowhere'}"
    )
    lines = [
        f"sparselora: {wanted} asks for sparsity and no site became sparse, so training runs dense.",
        "Looked for: feed-forward and attention blocks of frozen linear layers, and labels that mark output tokens.",
        f"Found: {found}.",
        "Declined:",
        *(reasons or ["  nothing: there was nothing to match"]),
    ]
    warnings.warn("\n".join(lines), stacklevel=2)


def _names_no_site(config: SparseLoRAConfig, graphs: Iterable[GraphReport]) -> bool:
    """Tell whether an option names sites, and none of those that it wants sparse is there."""
    if config.site_sparsity is None:
        return False
    wanted = [pattern for pattern, sparsity in config.site_sparsity.items() if sparsity]
    names = [site.name for graph in graphs for site in graph.sites]
    return not any(match_site(pattern, name) for pattern in wanted for name in names)


def tell_untrained(gm: fx.GraphModule, ctx: PassContext, model: nn.Module | None) -> None:
    """Warn once where something was asked for that the graph cannot have, because nothing of it is trained.

    Silent where PEFT's adapters are switched off: the forward of the base alone (the reference model of preference
    tuning, say) is what was asked for.
    """
    sparsity, requested = asks_for_sparsity(ctx.env.config), ctx.env.config.requested
    if not sparsity and not requested:
        return
    if any(parameter.trained for parameter in ctx.env.parameters.values()):
        without = f"dense, without {', '.join(requested)}" if requested else "dense"
        tell_once(
            f"TorchDynamo handed over a graph without its parameters, so it runs {without}. Its DDP optimizer does "
            "that, which cuts a graph into buckets of trained parameters: set "
            "torch._dynamo.config.optimize_ddp = False before the first step (adapters have few gradients, so little "
            "is lost), or train with SparseLoRACallback in transformers' Trainer, which does so"
        )
    elif sparsity and is_whole_step(gm, ctx):
        paths = frozenset(parameter.path for parameter in ctx.env.parameters.values())
        if model is not None and any(parameter.requires_grad for parameter in model.parameters()):
            tell_once(
                "no trained parameter of this model takes part in this forward, so it runs dense: its adapters are "
                "merged into the base or switched off. Call model.unmerge_adapter() (PEFT) before training goes on; "
                "evaluate under torch.no_grad(), which runs dense without this warning",
                ("merged", paths),
            )
        elif model is None or not are_disabled(model):
            tell_once(
                "no parameter of this model is trained (no adapter, or all frozen), so it runs dense. Add an adapter, "
                "for example with peft.get_peft_model, before training",
                paths,
            )


def tell_at_last_graph(gm: fx.GraphModule, config: SparseLoRAConfig) -> None:
    """Warn once of a frame where its last graph is compiled that Dynamo keeps: what needs another one runs eagerly."""
    limit = recompile_limit()
    if limit > 1 and graphs_of_frame() == limit - 1:
        wider = f"a token_bucket larger than {config.token_bucket}, " if config.token_bucket is not None else ""
        tell_once(
            f"this is the last of {limit} graphs that TorchDynamo keeps of one frame: a batch that fits none of them "
            f"will run eagerly, as if the backend were not there. Have fewer graphs: {wider}batches padded to a "
            "multiple of some length; or raise torch._dynamo.config.recompile_limit. TORCH_LOGS=recompiles says what "
            "made each of them",
            frame_key(gm),
        )


def tell_once(reason: str, model: object = None) -> None:
    """Warn of something that no session can remember: once in this process, or once for each model named."""
    if IN_PROCESS.once((reason, model)):
        warnings.warn(f"sparselora: {reason}.", stacklevel=3)
