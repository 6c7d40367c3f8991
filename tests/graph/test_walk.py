"""A walk meets each node once and goes on only where its step says so."""

from __future__ import annotations

import pytest
from torch import fx

from sparse_compile.graph.read import op_name
from sparse_compile.graph.walk import reach, readers


@pytest.fixture
def nodes() -> dict[str, fx.Node]:
    """Return x, of which two branches are computed that are summed, and a cast of the sum that is returned with x."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    left = graph.call_method("relu", (x,))
    right = graph.call_method("tanh", (x,))
    total = graph.call_method("add", (left, right))
    graph.output((graph.call_method("float", (total,)), x))
    return {node.name: node for node in graph.nodes}


def names(found: dict[fx.Node, None] | list[fx.Node]) -> list[str]:
    return [node.name for node in found]


def operands(node: fx.Node) -> list[fx.Node]:
    return node.all_input_nodes


def test_against_the_flow(nodes: dict[str, fx.Node]) -> None:
    """Depth first, the last operand first; x, which two branches lead to, is met once."""
    assert names(reach([nodes["add"]], operands)) == ["add", "tanh", "x", "relu"]


def test_with_the_flow(nodes: dict[str, fx.Node]) -> None:
    assert set(names(reach([nodes["relu"]], lambda node: node.users))) == {"relu", "add", "float_1", "output"}


def test_several_starts_are_met_and_walked_from(nodes: dict[str, fx.Node]) -> None:
    assert names(reach([nodes["relu"], nodes["tanh"]], operands)) == ["tanh", "x", "relu"]
    assert names(reach([nodes["x"], nodes["x"]], operands)) == ["x"]
    assert reach([], operands) == {}


def test_the_step_ends_a_branch(nodes: dict[str, fx.Node]) -> None:
    assert names(reach([nodes["add"]], lambda node: [] if node.name == "tanh" else operands(node))) == [
        "add",
        "tanh",
        "relu",
        "x",
    ]


def test_what_the_step_raises_ends_the_walk(nodes: dict[str, fx.Node]) -> None:
    seen = []

    def step(node: fx.Node) -> list[fx.Node]:
        seen.append(node.name)
        if node.name == "tanh":
            raise LookupError
        return operands(node)

    with pytest.raises(LookupError):
        reach([nodes["add"]], step)
    assert seen == ["add", "tanh"]


def test_readers(nodes: dict[str, fx.Node]) -> None:
    def is_cast(node: fx.Node) -> bool:
        return op_name(node) == "float"

    assert set(names(readers(nodes["x"], is_cast))) == {"relu", "tanh", "output"}
    assert names(readers(nodes["add"], is_cast)) == ["output"]
    assert readers(nodes["output"], is_cast) == []
