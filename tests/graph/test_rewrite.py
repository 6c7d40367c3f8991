"""Rewriting: copies keep names apart, inserted nodes hold their values."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F  # noqa: N812

from graphs import capture
from sparse_compile.graph.read import op_name, tensor_value, value_of
from sparse_compile.graph.rewrite import Rewriter, copy_graph_module


def double(x: Tensor) -> Tensor:
    return F.relu(x) + F.relu(x + 1)


def relus(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if "relu" in node.name]


def test_a_copy_gives_no_node_a_name_that_was_given_up() -> None:
    """Facts name nodes: `relu` must not come to mean another call."""
    gm = capture(double, torch.zeros(2, 3)).gm
    first = relus(gm)[0]
    first.replace_all_uses_with(first.args[0])
    gm.graph.erase_node(first)
    copy = copy_graph_module(gm)
    assert [node.name for node in copy.graph.nodes] == [node.name for node in gm.graph.nodes]
    rewriter = Rewriter(copy, "test")
    (left,) = relus(copy)
    with rewriter.before(left):
        assert rewriter.call(F.relu, left.args[0]).name not in (first.name, left.name)


def test_an_inserted_node_holds_its_value() -> None:
    x = torch.zeros(5, 3, requires_grad=True)
    gm = capture(double, x, dynamic=((x, 0),)).gm
    rewriter = Rewriter(gm, "test")
    node = relus(gm)[0]
    with rewriter.before(node):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        rows = rewriter.method("size", source, 0)
        flat = rewriter.method("reshape", source, -1)
        parts = rewriter.items(rewriter.call(torch.split, rewriter.method("double", source), 1, 1), 3)
        constant = rewriter.buffer("ones", torch.ones(3))
    batch = tensor_value(source).shape[0]  # type: ignore[union-attr]
    assert value_of(rows) is batch or value_of(rows) == batch
    assert str(tensor_value(flat).shape[0]) == f"3*{batch}"  # type: ignore[union-attr]
    assert [str(tensor_value(part).shape) for part in parts] == [f"torch.Size([{batch}, 1])"] * 3  # type: ignore[union-attr]
    assert tensor_value(parts[0]).dtype == torch.float64  # type: ignore[union-attr]
    assert tensor_value(flat).requires_grad and not tensor_value(constant).requires_grad  # type: ignore[union-attr]


def test_constants_of_one_name_are_kept_apart() -> None:
    gm = capture(double, torch.zeros(2, 3)).gm
    rewriter = Rewriter(gm, "test")
    ones, zeros = torch.ones(3), torch.zeros(3)
    with rewriter.before(relus(gm)[0]):
        nodes = [rewriter.buffer("same", value) for value in (ones, zeros, ones, zeros)]
    assert [str(node.target) for node in nodes] == ["same", "same_1", "same", "same_1"]
    assert gm.same is ones and gm.same_1 is zeros


def test_a_value_is_that_of_the_modes_in_force() -> None:
    """Autocast in the graph, and gradients that it switches off, as they are where the node stands."""

    def function(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = x.relu()
        with torch.no_grad():
            off = low.sigmoid()
        return off + x.tanh()

    gm = capture(function, torch.zeros(2, 2, requires_grad=True)).gm
    rewriter = Rewriter(gm, "test")
    found = {}
    for name in ("relu", "sigmoid", "tanh"):
        anchor = next(node for node in gm.graph.nodes if op_name(node) == name)
        (x,) = (node for node in gm.graph.nodes if node.op == "placeholder")
        with rewriter.before(anchor):
            found[name] = tensor_value(rewriter.call(torch.matmul, x, x))
    values = {name: (value.dtype, value.requires_grad) for name, value in found.items() if value is not None}
    assert values == {
        "relu": (torch.bfloat16, True), "sigmoid": (torch.float32, False), "tanh": (torch.float32, True),
    }  # fmt: skip


def test_a_changed_node_is_evaluated_again() -> None:
    gm = capture(double, torch.zeros(4, 3)).gm
    rewriter = Rewriter(gm, "test")
    node = relus(gm)[0]
    with rewriter.before(node):
        half = rewriter.call(operator.getitem, node.args[0], slice(0, 2))
    node.update_arg(0, half)
    rewriter.reevaluate(node)
    assert tensor_value(node).shape == (2, 3)  # type: ignore[union-attr]
    assert node.meta["sparselora"] == {"pass": "test", "site": ""}


def test_an_operand_without_a_value_is_an_error() -> None:
    gm = capture(double, torch.zeros(4, 3)).gm
    rewriter = Rewriter(gm, "test")
    node = relus(gm)[0]
    del node.meta["example_value"]
    with rewriter.before(node.next), pytest.raises(ValueError, match="what relu holds was not recorded"):
        rewriter.call(torch.abs, node)


def test_hooks_around_a_step_see_no_stand_in() -> None:
    """Offloading of activations, for one: what it is handed would be a tensor without data."""
    gm = capture(double, torch.zeros(4, 3, requires_grad=True)).gm
    seen: list[Tensor] = []
    node = relus(gm)[0]
    rewriter = Rewriter(gm, "test")
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda value: seen.append(value) or value, lambda value: value)  # type: ignore[func-returns-value]
    with hooks, rewriter.before(node):
        rewriter.call(torch.mul, node.args[0], node.args[0])
    assert seen == []
