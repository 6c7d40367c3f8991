"""What a matcher that declines says, and what a pass reports of it."""

from __future__ import annotations

from torch import fx

from sparse_compile.graph.declined import Declined
from sparse_compile.graph.facts import Rejection


def test_it_names_a_node_and_a_reason() -> None:
    node = fx.Graph().placeholder("x")
    for place in (node, "x"):
        declined = Declined(place, "it is read twice")
        assert (declined.node, declined.reason, str(declined)) == ("x", "it is read twice", "it is read twice")
        assert declined.by("find_ffn") == Rejection("find_ffn", "x", "it is read twice")


def test_a_pass_may_report_what_it_asked_about() -> None:
    whole = fx.Graph().placeholder("attention")
    declined = Declined("view", "view: the view does not fit the layout")
    for place in (whole, "attention"):
        assert declined.by("find_attention", at=place) == Rejection("find_attention", "attention", declined.reason)
