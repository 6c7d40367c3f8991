"""Reading calls: whose they are, and their arguments by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F  # noqa: N812

from graphs import capture
from sparse_compile.graph.read import argument, calls_torch, op_name, set_argument


@torch.library.custom_op("foreign::relu", mutates_args=())
def relu(x: Tensor) -> Tensor:
    return x.cumsum(0)


@relu.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def only_call(function: Callable[..., Any], *inputs: Tensor) -> fx.Node:
    (node,) = (each for each in capture(function, *inputs).gm.graph.nodes if each.op.startswith("call"))
    return node


@pytest.mark.parametrize(
    ("function", "known"),
    [
        (F.relu, True),
        (torch.relu, True),
        (lambda x: x.relu(), True),
        (lambda x: torch.ops.aten.relu.default(x), True),
        (lambda x: torch.ops.foreign.relu(x), False),
        (lambda x: torch.ops.foreign.relu.default(x), False),
    ],
)
def test_a_name_says_what_is_called_only_in_libraries_that_are_known(function: Callable[..., Any], known: bool) -> None:
    node = only_call(function, torch.zeros(2, 2))
    assert op_name(node).startswith("relu") or "relu" in op_name(node)
    assert calls_torch(node) is known


@pytest.mark.parametrize(
    ("function", "name", "value"),
    [
        (lambda x: x.transpose(0, 1), "dim1", 1),
        (lambda x: x.swapaxes(axis0=0, axis1=1), "dim1", 1),
        (lambda x: F.dropout(x, 0.3, True), "training", True),
        (lambda x: torch.dropout(x, p=0.3, train=True), "training", True),
        (lambda x: x.chunk(2, dim=-1), "dim", -1),
        (lambda x: x.split(1, 1), "dim", 1),
        (lambda x: x.unbind(1), "dim", 1),
        (lambda x: torch.linalg.vector_norm(x, dim=1), "dim", 1),
        (lambda x: torch.linalg.vector_norm(x, 2, 1), "dim", 1),
        (lambda x: x.norm(p=2, dim=1), "ord", 2),
        (lambda x: x.permute(dims=(1, 0)), "dims", (1, 0)),
        (lambda x: F.pad(x, (0, 1), value=3.0), "value", 3.0),
        (lambda x: x.unsqueeze(0), "keepdim", None),
        (lambda x: F.rms_norm(x, (2,), None, 1e-6), "eps", 1e-6),
        (lambda x: F.rms_norm(x, (2,), None, 1e-6), "bias", None),
        (lambda x: F.layer_norm(x, (2,), None, None, 1e-6), "eps", 1e-6),
        (lambda x: torch.var(x, 1, True, True), "keepdim", True),
        (lambda x: torch.var(x, 1, True, False), "unbiased", True),
        (lambda x: torch.std(x, dim=1, correction=0), "correction", 0),
        (lambda x: torch.std(x, dim=1, correction=0), "keepdim", None),
        (lambda x: torch.softmax(x, 1, torch.float64), "dtype", torch.float64),
        (lambda x: torch.softmax(x, 1, torch.float64), "keepdim", None),
        (lambda x: x.mean(1, True), "keepdim", True),
    ],
)
def test_arguments_by_name(function: Callable[..., Any], name: str, value: object) -> None:
    graph = capture(function, torch.zeros(2, 2)).gm.graph
    node = next(each for each in graph.nodes if each.op.startswith("call"))
    assert argument(node, name) == value


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.split(tensor=x, split_size_or_sections=1),
        lambda x: torch.linalg.vector_norm(x=x, dim=1),
        lambda x: torch.flatten(input=x),
    ],
)
def test_the_first_argument_by_name(function: Callable[..., Any]) -> None:
    graph = capture(function, torch.zeros(2, 2)).gm.graph
    node = next(each for each in graph.nodes if each.op.startswith("call"))
    assert argument(node, "input").op == "placeholder"


def test_an_argument_is_set_as_it_was_given() -> None:
    by_position = only_call(lambda x: x.unsqueeze(0), torch.zeros(2))
    by_name = only_call(lambda x: x.unsqueeze(dim=0), torch.zeros(2))
    for node in (by_position, by_name):
        set_argument(node, "dim", -1)
        assert argument(node, "dim") == -1
    assert by_position.args[1] == -1 and by_name.kwargs == {"dim": -1}
