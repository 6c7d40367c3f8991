"""Make the page of a report from its template."""

from __future__ import annotations

from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined

from sparse_compile.compiler.page.graph_changes import graph_changes
from sparse_compile.compiler.page.view import page_data
from sparse_compile.compiler.report_data import StepReport

__all__ = ["page_of"]


def page_of(report: StepReport) -> str:
    """Return the page of a report: HTML with its style, its script and all that it shows, and no reference elsewhere.

    Args:
        report: what is shown. Graphs and kernels are shown where it has their texts.
    """
    template = _environment().get_template("page.html")
    graphs = [
        {"name": graph.compile_id, **graph_changes(texts.steps)}
        for graph, texts in zip(report.graphs, report.texts, strict=False)
    ]
    return template.render(page_data(report), graphs=graphs)


@cache
def _environment() -> Environment:
    """Return the place of the template; whatever is put into it is escaped."""
    return Environment(
        loader=PackageLoader("sparse_compile.compiler.page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
