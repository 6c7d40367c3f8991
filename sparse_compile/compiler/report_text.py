"""The report as text: what will happen in words, then the sites, the passes and what was declined."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tabulate import tabulate

from sparse_compile.compiler.report_data import GraphReport, SiteReport, StepReport
from sparse_compile.compiler.report_names import fold, shared_prefix
from sparse_compile.compiler.report_reasons import KINDS
from sparse_compile.compiler.report_words import (
    done_with_context,
    flops_words,
    grouped_orders,
    note_of,
    provider_words,
    result_of,
    roles_words,
    summary,
    summary_of,
)
from sparse_compile.graph.facts import MaskedLayer

__all__ = ["graph_text", "report_text"]


def report_text(report: StepReport) -> str:
    """Return a report as text."""
    first, *rest = summary(report)
    head = [
        first,
        *(f"  {line}" for line in rest),
        "",
        f"options, from {report.options_from}: {_chosen(report.options)}",
    ]
    sections = ["\n".join(head)]
    for graph in report.graphs:
        title = [f"graph {graph.compile_id}: {roles_words(graph)}", ""] if len(report.graphs) > 1 else []
        sections.append("\n".join([*title, graph_text(graph)]))
    return "\n\n".join(sections)


def _chosen(options: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def graph_text(graph: GraphReport) -> str:
    """Return what is to be said of one graph, as text."""
    prefix = shared_prefix(site.name for site in graph.sites)
    parts = [_sites(graph.sites, prefix), _passes(graph)]
    if graph.masks:
        parts.append(_masks(graph.masks, prefix))
    if graph.orders:
        parts.append(_orders(graph, prefix))
    said = {(site.name, site.why_dense) for site in graph.sites}
    rejections = [each for each in graph.rejections if (each.node, each.reason) not in said]
    if rejections:
        parts.append("\n".join(["declined:", *summary_of(rejections, places=graph.places, prefix=prefix)]))
    return "\n\n".join(parts)


def _sites(sites: Sequence[SiteReport], prefix: str) -> str:
    """Return a line for each kind of site that is treated alike, with the blocks in which it is."""
    if not sites:
        return "no site: no block of frozen linear layers was found that could be sparse"
    groups: dict[tuple[str, ...], list[str]] = {}
    for site in sites:
        end = site.name.rpartition(".")[2]
        row = (KINDS[site.kind], done_with_context(site), str(site.adapters), provider_words(site), note_of(site))
        groups.setdefault((end, *row), []).append(site.name.removeprefix(prefix))
    rows = [(", ".join(fold(names)), *row) for (_, *row), names in groups.items()]
    begin = f" (each name begins with {prefix})" if prefix else ""
    return f"sites{begin}:\n" + _table(("site", "kind", "for context tokens", "adapters", "computed by", "note"), rows)


def _passes(graph: GraphReport) -> str:
    """Return the passes that changed the graph or did not run, with the FLOPs of a step before and after."""
    shown = [each for each in graph.passes if each.record.changed or each.record.skipped]
    rows = [
        (each.record.name, result_of(each), flops_words(each.flops_before), flops_words(each.flops_after))
        for each in shown
    ]
    silent = len(graph.passes) - len(shown)
    text = _table(("pass", "result", "FLOPs before", "after"), rows) if rows else "no pass changed the graph"
    return f"{text}\n{silent} of {len(graph.passes)} passes had nothing to change"


def _masks(masks: Sequence[MaskedLayer], prefix: str) -> str:
    """Return the pruned layers, those of equal blocks in one line."""
    groups: dict[tuple[str, str, str], list[MaskedLayer]] = {}
    for each in masks:
        end = each.projection.rpartition(".")[2]
        groups.setdefault((end, each.pattern, each.reason or "kept"), []).append(each)
    rows = []
    for (_, pattern, mask), layers in groups.items():
        names = fold(each.projection.removeprefix(prefix) for each in layers)
        zeros = sorted({f"{each.sparsity:.1%}": each.sparsity for each in layers}.items(), key=lambda each: each[1])
        ends = zeros[0][0] if len(zeros) == 1 else f"{zeros[0][0]} to {zeros[-1][0]}"
        rows.append((", ".join(names), ends, pattern, mask))
    return _table(("pruned layer", "zeros", "pattern", "mask"), rows)


def _orders(graph: GraphReport, prefix: str) -> str:
    """Return how the products of layers with their adapters are computed."""
    groups = grouped_orders(graph.orders)
    rows = [(each.words, _some(each.layers, prefix), f"{each.count}", each.pays) for each in groups]
    return _table(("products of an adapter", "layers", "count", "merging pays for tokens"), rows)


def _some(names: Sequence[str], prefix: str, most: int = 3) -> str:
    """Return the first names, and how many there are beside them."""
    shown = ", ".join(name.removeprefix(prefix) for name in names[:most])
    return shown if len(names) <= most else f"{shown}, ..."


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Return aligned columns of text, without the columns that are empty."""
    filled = list(rows)
    columns = [at for at in range(len(header)) if any(row[at] for row in filled)]
    return tabulate(
        [[row[at] for at in columns] for row in filled],
        [header[at] for at in columns],
        tablefmt="plain",
        disable_numparse=True,
    )
