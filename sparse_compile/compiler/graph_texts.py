"""The text of one graph as captured and after each pass, and the kernels that were generated for it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from sparse_compile.graph.sites import Parameter
from sparse_compile.graph.text import render_graph


class GraphTexts:
    """Keeps the text of a graph at each step of the pipeline.

    Attributes:
        steps: by step (`"captured"`, or a pass), the text of the graph after it.
        kernels: by file name, the source of each generated kernel.
    """

    def __init__(self) -> None:
        self.steps: dict[str, str] = {}
        self.kernels: dict[str, str] = {}
        self._last: tuple[fx.Graph, str] | None = None

    def graph(self, name: str, graph: fx.Graph, parameters: Mapping[str, Parameter]) -> None:
        """Keep the graph as it stands after the step `name`.

        Args:
            name: the step.
            graph: another one than at the step before, where this one changed it.
            parameters: its parameters by placeholder name.
        """
        # Most passes hand on the graph that they were given: its text is not made again.
        if self._last is None or self._last[0] is not graph:
            self._last = graph, render_graph(graph, parameters)
        self.steps[name] = self._last[1]

    def kernel(self, name: str, source: str) -> None:
        """Keep the source of a generated kernel."""
        self.kernels[name] = source
