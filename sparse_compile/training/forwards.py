"""Count the training forwards of a model since its last optimizer step."""

from __future__ import annotations

from collections.abc import Hashable

__all__ = ["ForwardCount"]


class ForwardCount:
    """Count forwards by the graph that ran first since the last optimizer step: a model may be in several graphs.

    Attributes:
        number: forwards since the last optimizer step.
    """

    def __init__(self) -> None:
        self.number = 0
        self._first_graph: Hashable | None = None
        self._step = 0

    def note(self, graph_key: Hashable) -> bool:
        """Note that a graph runs; return whether that is a forward of the model."""
        if self.number == 0:
            self._first_graph = graph_key
        if graph_key != self._first_graph:
            return False
        self.number += 1
        return True

    def stand_at(self, step: int) -> None:
        """Begin anew where the run stands at another optimizer step than before."""
        if step != self._step:
            self._step = step
            self.number = 0
