"""What a matcher answers where it does not apply."""

from __future__ import annotations

from torch import fx

from sparse_compile.graph.facts import Rejection

__all__ = ["Declined"]


class Declined(Exception):  # noqa: N818  (an answer, not a fault)
    """Raised by a matcher that looked and does not apply; the pass that asked reports it and leaves the graph alone.

    A matcher that finds nothing to look at returns None instead: nothing is reported of it.

    Args:
        node: where the matcher looked: a node, or the name of a node or site.
        reason: what is in the way, in words that a user can act on.
    """

    def __init__(self, node: fx.Node | str, reason: str) -> None:
        super().__init__(reason)
        self.node = str(node)
        self.reason = reason

    def by(self, rule: str, *, at: fx.Node | str | None = None) -> Rejection:
        """Return what the pass (or the rule within it) reports.

        Args:
            rule: the pass or the rule.
            at: what the pass was asked about, where it reports that and not the node where the matcher looked.
        """
        return Rejection(rule, self.node if at is None else str(at), self.reason)
