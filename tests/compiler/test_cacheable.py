"""Methods on inserted tensors become functions that do the same; what Dynamo captured stays as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from sparse_compile.compiler.cacheable import spell_as_functions

CALLS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "reshape": ("reshape", (-1, 4)),
    "reshape, one sequence": ("reshape", ((3, 8),)),
    "view": ("view", (3, 8)),
    "view as another type": ("view", (torch.int32,)),
    "expand": ("expand", (2, 2, 3, 4)),
    "permute": ("permute", (2, 0, 1)),
    "repeat": ("repeat", (1, 2, 1)),
    "transpose": ("transpose", (0, 1)),
    "contiguous": ("contiguous", ()),
    "flatten": ("flatten", (0, 1)),
    "unsqueeze": ("unsqueeze", (0,)),
    "narrow": ("narrow", (1, 0, 2)),
    "size of a dimension": ("size", (1,)),
    "to a type": ("to", (torch.float64,)),
    "to a device": ("to", (torch.device("cpu"),)),
    "float": ("float", ()),
    "bool": ("bool", ()),
    "mean": ("mean", (1,)),
    "any": ("any", (1,)),
    "clamp": ("clamp", (1.0, 3.0)),
    "split": ("split", (1,)),
    "add_": ("add_", (1,)),
}


def graph_of(method: str, args: tuple[Any, ...], *, inserted: bool) -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.zeros(2, 3, 4)
    y = graph.call_function(torch.add, (x, 1))
    if not inserted:
        y.meta["example_value"] = torch.zeros(2, 3, 4)
    graph.output(graph.call_method(method, (y, *args)))
    return fx.GraphModule({}, graph)


@pytest.mark.parametrize("case", CALLS)
def test_a_function_does_what_the_method_does(case: str) -> None:
    gm = graph_of(*CALLS[case], inserted=True)
    x = torch.arange(24.0).reshape(2, 3, 4)
    expected = gm(x)
    assert spell_as_functions(gm) == 1
    assert not gm.graph.find_nodes(op="call_method", target=CALLS[case][0])
    actual = gm(x)
    assert type(actual) is type(expected) or case == "split"
    for found, wanted in zip(actual, expected, strict=True) if case == "split" else [(actual, expected)]:
        if isinstance(wanted, Tensor):
            assert (found.dtype, found.shape, found.stride()) == (wanted.dtype, wanted.shape, wanted.stride())
            assert torch.equal(found, wanted)
        else:
            assert found == wanted


def test_what_was_captured_stays() -> None:
    gm = graph_of("reshape", (-1, 4), inserted=False)
    assert spell_as_functions(gm) == 0
    assert gm.graph.find_nodes(op="call_method", target="reshape")


def test_a_method_without_a_function_stays() -> None:
    gm = graph_of("size", (), inserted=True)
    assert spell_as_functions(gm) == 0
    assert gm(torch.zeros(2, 3, 4)) == (2, 3, 4)
