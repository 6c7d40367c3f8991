"""What a report says, in words: the summary, each site, and what was declined. Text and page lay it out."""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sparse_compile.compiler.pipeline import PASSES
from sparse_compile.compiler.report_data import GraphReport, PassReport, SiteReport, StepReport
from sparse_compile.compiler.report_names import fold
from sparse_compile.graph.cost_note import is_cost_note
from sparse_compile.graph.facts import ProductOrder, Rejection
from sparse_compile.passes.protocol import Numerics

__all__ = [
    "ALL_TRAINED",
    "Declination",
    "OrderGroup",
    "counted",
    "counted_adapters",
    "declinations",
    "done_with_context",
    "flops_words",
    "grouped_orders",
    "note_of",
    "pass_words",
    "provider_words",
    "result_of",
    "roles_words",
    "summary",
    "summary_of",
]

ALL_TRAINED = "all weights are trained: this needs frozen layers with adapters (LoRA)"
"""What a model is told that is trained as a whole."""

_ROLES = {
    "cross_entropy": "told apart by the labels of the loss",
    "labels": "told apart by the labels that the graph reads",
    "given": "told apart by token_roles(...)",
}
_MERGED = {
    "F1B1": "apart, as the model has them",
    "F1B5": "merged into the weight in the backward",
    "F2B1": "merged into the weight in the forward",
    "F2B5": "merged into the weight in forward and backward",
}
"""The orders of `kernels/merged_linear`, by what becomes of the adapter's factors."""

_ANALYSES = {each.name for each in PASSES if each.analysis}
_UNITS = ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1e3, "kFLOP"))


# --- The summary ------------------------------------------------------------------------------------------------------


def summary(report: StepReport) -> list[str]:
    """Return in sentences what will happen: the most important one first."""
    if not report.graphs:
        return [f"Nothing was captured to train: {report.untrained}."]
    lines = [_headline(report), *_saved(report)]
    graph = max(report.graphs, key=lambda each: (each.roles is not None, len(each.sites)))
    lines.append(roles_words(graph))
    adapters = counted_adapters(
        sum(each.adapters for each in report.graphs), sum(each.frozen_adapters for each in report.graphs)
    )
    lines.append(f"{counted(sum(each.projections for each in report.graphs), 'frozen linear layer')} with {adapters}.")
    if report.expected_seconds is not None:
        dense, expected = report.expected_seconds
        lines.append(
            f"The recipe's calibration measured {dense:.3g} s for a dense step, and expects {expected:.3g} s of a "
            f"sparse one ({dense / expected:.2f}x as fast)."
        )
    seconds = sum(each.record.milliseconds for graph in report.graphs for each in graph.passes) / 1e3
    lines.append(f"The passes took {seconds:.1f} s on this machine; Inductor's compilation comes on top.")
    return [*lines, *_left_out(report)]


def _headline(report: StepReport) -> str:
    if all(graph.all_trained for graph in report.graphs):
        return f"No site can be sparse, because {ALL_TRAINED}."
    sparse = sum(site.sparse for site in report.sites)
    share = _share(report.flops_after, report.flops_before)
    sizes = f"{flops_words(report.flops_after)} of {flops_words(report.flops_before)}"
    flops = f"{share} of the FLOPs of a dense step ({sizes})" if share else "FLOPs were not counted"
    line = f"{sparse} of {counted(len(report.sites), 'site')} sparse, {flops}."
    reasons = Counter(note_of(site) for site in report.sites)
    if sparse or not reasons:
        return line
    (reason, count), *others = reasons.most_common()
    return f"{line} {'All are' if not others else f'{count} are'} dense because: {reason}."


def _saved(report: StepReport) -> Iterable[str]:
    """Yield how much of what is saved is exact, where both kinds of passes save something."""
    saved = dict.fromkeys((each.value for each in Numerics), 0.0)
    for graph in report.graphs:
        for each in graph.passes:
            saved[each.record.numerics] += each.flops_before - each.flops_after
    exact = _share(saved[Numerics.EXACT.value], report.flops_before)
    sparsity = _share(saved[Numerics.APPROXIMATE.value], report.flops_before)
    if exact and sparsity and saved[Numerics.APPROXIMATE.value]:
        yield f"Exact rewrites save {exact} of the FLOPs, sparsity (an approximation) {sparsity}."


def _left_out(report: StepReport) -> Iterable[str]:
    """Yield the passes that did not run, with the reasons."""
    skipped: dict[str, dict[str, None]] = {}
    for graph in report.graphs:
        for each in graph.passes:
            if each.record.skipped:
                skipped.setdefault(each.record.skipped, {})[each.record.name] = None
    for reason, names in skipped.items():
        yield f"Left out ({reason}): {', '.join(names)}."


def roles_words(graph: GraphReport) -> str:
    """Return how many tokens have which role, and how that is known."""
    if graph.roles is None:
        return (
            "Nothing tells output tokens from context: that takes a loss with labels in the model, or token_roles(...)."
        )
    return f"{graph.tokens.context} context and {graph.tokens.output} output tokens, {_ROLES[graph.roles]}."


def counted(count: int, thing: str) -> str:
    """Return a number of things in words."""
    return f"{count} {thing}" + ("" if count == 1 else "s")


def counted_adapters(adapters: int, frozen: int) -> str:
    """Return a number of adapters in words, with how many of them are not trained."""
    return f"{adapters} adapters" + (f", {frozen} of them frozen" if frozen else "")


def flops_words(flops: float) -> str:
    """Return FLOPs with a unit and three digits; in words where they are not known."""
    if math.isnan(flops):
        return "unknown FLOPs"
    size, unit = next(((size, unit) for size, unit in _UNITS if abs(flops) >= size), (1, "FLOP"))
    return f"{float(f'{flops / size:.3g}'):g} {unit}"


def _share(part: float, whole: float) -> str:
    """Return a share in percent; empty where it is not known."""
    return "" if math.isnan(part / whole if whole else math.nan) else f"{part / whole:.0%}"


# --- A site -----------------------------------------------------------------------------------------------------------


def done_with_context(site: SiteReport) -> str:
    """Return what is computed of context tokens at a site."""
    ranked = site.provider.partition("map of rank ")[2]
    if site.left and site.kind == "ffn":
        return "nothing: they have left"
    if site.left:
        return "keys and values alone" + (f", and a map of rank {ranked}" if ranked else "")
    if not site.sparse:
        return "all (dense)"
    return f"a map of rank {ranked}" if ranked else f"{site.kept} of {site.total} channels"


def provider_words(site: SiteReport) -> str:
    """Return what computes the kept channels of a site; empty where there is nothing to choose."""
    return site.provider if site.sparse and "map" not in site.provider and not site.left else ""


def note_of(site: SiteReport) -> str:
    """Return why a site is dense, or what is to be known of a sparse one; often empty."""
    if is_cost_note(site.reason):
        return f"{'named in the options, but does' if site.sparse else 'does'} not pay: {site.reason}"
    return site.why_dense or site.reason


# --- What was declined ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Declination:
    """Places that one rule declined for one reason.

    Attributes:
        rule: the pass, with the rule's name where it has several.
        reason: what is in the way.
        places: where, folded; node names only where nothing better is known, and none for the graph as a whole.
        count: of the places.
    """

    rule: str
    reason: str
    places: tuple[str, ...]
    count: int


def declinations(rejections: Iterable[Rejection], places: Mapping[str, str] | None = None) -> list[Declination]:
    """Return rejections by rule and reason, the commonest first.

    Args:
        rejections: in any order.
        places: where in the model the nodes stand that they name.
    """
    groups: dict[tuple[str, str], list[Rejection]] = {}
    for each in rejections:
        # `add_3` and `add_7` in a reason are the same node of two blocks.
        groups.setdefault((each.rule, re.sub(r"\b([a-z]\w*?)_\d+\b", r"\1", each.reason)), []).append(each)
    found = []
    for (rule, reason), members in groups.items():
        where = [(places or {}).get(each.node, each.node) for each in members if each.node != "graph"]
        said = {each.reason for each in members}
        found.append(Declination(rule, said.pop() if len(said) == 1 else reason, tuple(fold(where)), len(members)))
    return sorted(found, key=lambda each: -each.count)


def summary_of(
    rejections: Iterable[Rejection], most: int = 12, places: Mapping[str, str] | None = None, prefix: str = ""
) -> list[str]:
    """Return a line for each reason, with the places where it was met.

    Args:
        rejections: in any order.
        most: lines to return, beside one that counts the rest.
        places: where in the model the nodes stand that they name.
        prefix: what is left out of the names of places.
    """
    groups = declinations(rejections, places)
    lines = [f"  {each.rule}: {each.reason}{_where(each, prefix)}" for each in groups[:most]]
    left = len(groups) - most
    return lines if left <= 0 else [*lines, f"  and {left} more reasons"]


def _where(each: Declination, prefix: str, most: int = 2) -> str:
    """Return the first places in brackets; nothing for the graph as a whole."""
    if not each.places:
        return ""
    more = len(each.places) - most
    shown = ", ".join(place.removeprefix(prefix) for place in each.places[:most])
    return f" ({shown}{f' and {more} more' if more > 0 else ''})"


# --- Passes and products ----------------------------------------------------------------------------------------------


def pass_words(name: str) -> str:
    """Return what a pass does, in one sentence; empty for a pass of another list."""
    modules = {each.name: type(each).__module__ for each in PASSES}
    documented = sys.modules[modules[name]].__doc__ if name in modules else None
    return (documented or "").partition("\n")[0]


def result_of(each: PassReport) -> str:
    """Return whether a pass changed the graph, or why it did not run."""
    unchanged = "only looks" if each.record.name in _ANALYSES else "nothing to change"
    return each.record.skipped or ("changed" if each.record.changed else unchanged)


@dataclass(frozen=True)
class OrderGroup:
    """Layers whose adapters are multiplied in one order.

    Attributes:
        words: the order.
        layers: the names, folded.
        count: of the layers.
        pays: for which numbers of tokens merging pays.
    """

    words: str
    layers: tuple[str, ...]
    count: int
    pays: str


def grouped_orders(orders: Sequence[ProductOrder]) -> list[OrderGroup]:
    """Return the layers that could have another order of their products, by the order they have."""
    groups: dict[str, list[ProductOrder]] = {}
    for each in orders:
        groups.setdefault(each.order, []).append(each)
    return [
        OrderGroup(_MERGED[order], tuple(fold(each.projection for each in members)), len(members), _pays(members))
        for order, members in groups.items()
    ]


def _pays(orders: Sequence[ProductOrder]) -> str:
    """Return for which numbers of tokens merging pays: `N > 119` and `N > 278` are "more than 119 to 278"."""
    known = sorted({int(each.break_even.rpartition(" ")[2]) for each in orders if each.break_even != "never"})
    if not known:
        return "never"
    return "more than " + (f"{known[0]}" if len(known) == 1 else f"{known[0]} to {known[-1]}, by the layer")
