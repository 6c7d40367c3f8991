"""What the page shows of a report, as plain data: words, shares and names; the template lays it out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from sparse_compile.compiler.graph_texts import GraphTexts
from sparse_compile.compiler.report_data import GraphReport, SiteReport, StepReport
from sparse_compile.compiler.report_names import at_block, shared_prefix
from sparse_compile.compiler.report_reasons import KINDS
from sparse_compile.compiler.report_words import (
    declinations,
    done_with_context,
    flops_words,
    grouped_orders,
    note_of,
    pass_words,
    provider_words,
    result_of,
    roles_words,
    summary,
)

__all__ = ["page_data"]


def page_data(report: StepReport) -> dict[str, Any]:
    """Return what the template of the page is filled with, but for the graphs."""
    headline, *sentences = summary(report)
    return {
        "headline": headline,
        "sentences": sentences,
        "options": {name: repr(value) for name, value in report.options.items()},
        "options_from": report.options_from,
        "reports": [_graph(graph) for graph in report.graphs],
        "kernels": [kernel for texts in report.texts for kernel in _kernels(texts)],
    }


def _graph(graph: GraphReport) -> dict[str, Any]:
    prefix = shared_prefix(site.name for site in graph.sites)
    return {
        "name": graph.compile_id,
        "roles": roles_words(graph),
        "prefix": prefix,
        "blocks": _blocks(graph.sites, prefix),
        "waterfall": _waterfall(graph),
        "passes": _passes(graph),
        "declined": [
            {
                "rule": each.rule,
                "reason": each.reason,
                "count": each.count,
                "places": [place.removeprefix(prefix) for place in each.places],
            }
            for each in declinations(graph.rejections, graph.places)
        ],
        "masks": [
            {
                "layer": each.projection.removeprefix(prefix),
                "zeros": f"{each.sparsity:.1%}",
                "pattern": each.pattern,
                "mask": each.reason or "kept",
            }
            for each in graph.masks
        ],
        "orders": [
            {"words": each.words, "layers": [name.removeprefix(prefix) for name in each.layers], "pays": each.pays}
            for each in grouped_orders(graph.orders)
        ],
    }


def _blocks(sites: Iterable[SiteReport], prefix: str) -> list[dict[str, Any]]:
    """Return the sites by block, in the order of the model."""
    blocks: dict[str, list[dict[str, Any]]] = {}
    for site in sites:
        name = site.name.removeprefix(prefix)
        before, number, after = at_block(name)
        block = name if number is None else f"{before}{number}"
        blocks.setdefault(block, []).append(
            {
                "name": name,
                "part": after.removeprefix(".") or name,
                "kind": KINDS[site.kind],
                "state": _state(site),
                "context": done_with_context(site),
                "sparsity": f"{site.sparsity:g}" if 0 < site.sparsity < 1 else "",
                "adapters": site.adapters,
                "provider": provider_words(site),
                "note": note_of(site),
            }
        )
    return [{"name": name, "sites": each} for name, each in blocks.items()]


def _state(site: SiteReport) -> str:
    """Return how a site is coloured."""
    if site.left:
        return "left"
    if not site.sparse:
        return "dense"
    return "sparse" if provider_words(site) else "map"


def _waterfall(graph: GraphReport) -> list[dict[str, Any]]:
    """Return a bar for the captured graph, one for each pass that changed its FLOPs, and one for what will run.

    Each has its place and its width in percent of the widest. There is none where FLOPs were not counted.
    """
    totals = [graph.flops_before, graph.flops_after, *(each.flops_after for each in graph.passes)]
    widest = max(totals)
    if not widest or any(math.isnan(each) for each in totals):
        return []

    def bar(name: str, kind: str, low: float, high: float, words: str) -> dict[str, Any]:
        left, width = 100 * low / widest, 100 * (high - low) / widest
        return {"name": name, "kind": kind, "left": f"{left:.2f}", "width": f"{width:.2f}", "words": words}

    bars = [bar("as captured", "total", 0, graph.flops_before, flops_words(graph.flops_before))]
    for each in graph.passes:
        before, after = each.flops_before, each.flops_after
        if before != after:
            words = f"{'-' if after < before else '+'}{flops_words(abs(after - before))}"
            kind = each.record.numerics if after < before else "added"
            bars.append(bar(each.record.name, kind, min(before, after), max(before, after), words))
    return [*bars, bar("as it will run", "total", 0, graph.flops_after, flops_words(graph.flops_after))]


def _passes(graph: GraphReport) -> list[dict[str, Any]]:
    return [
        {
            "name": each.record.name,
            "words": pass_words(each.record.name),
            "numerics": each.record.numerics,
            "result": result_of(each),
            "changed": each.record.changed,
            "nodes": f"{each.record.nodes_before} → {each.record.nodes_after}",
            "milliseconds": f"{each.record.milliseconds:.0f}",
            "flops": f"{flops_words(each.flops_before)} → {flops_words(each.flops_after)}",
            "stats": _stats(each.record.stats),
        }
        for each in graph.passes
    ]


def _stats(stats: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in stats.items() if count)


def _kernels(texts: GraphTexts) -> list[dict[str, Any]]:
    """Return the sources of kernels, each once: those of equal blocks differ in the first line, their name, alone."""
    kernels: dict[str, list[str]] = {}
    sources: dict[str, str] = {}
    for name, source in texts.kernels.items():
        body = source.partition("\n")[2]
        kernels.setdefault(body, []).append(name)
        sources.setdefault(body, source)
    return [{"names": names, "source": sources[body]} for body, names in kernels.items()]
