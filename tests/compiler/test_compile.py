"""`sparse_compile.compile`: what `model.compile(backend="sparselora")` does, with the options checked at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import sparse_compile
from models import batch, fp64_decoder
from sparse_compile import SparseLoRAConfig
from sparse_compile.torch_private.modules import backend_name, backend_options

SITES = {"layers.1.mlp": 0.5}


@pytest.mark.parametrize(
    ("options", "choices"),
    [
        ({"layer_sparsity": SITES}, {}),
        (SparseLoRAConfig(layer_sparsity=SITES), {}),
        (None, {"layer_sparsity": SITES}),
    ],
    ids=["dict", "config", "keywords"],
)
def test_the_model_itself_is_compiled_with_the_options(options: Any, choices: dict[str, Any]) -> None:
    model = nn.Linear(2, 2)
    assert sparse_compile.compile(model, options, **choices) is model
    assert (backend_name(model), backend_options(model)) == ("sparselora", {"layer_sparsity": SITES})


@pytest.mark.slow
def test_it_trains_as_the_string_backend_does(aot_eager_inductor: Any) -> None:
    inputs = batch(61)
    ours = sparse_compile.compile(fp64_decoder(layers=3), layer_sparsity=SITES)
    by_name = fp64_decoder(layers=3)
    by_name.compile(backend="sparselora", options={"layer_sparsity": SITES})
    assert torch.equal(ours(**inputs)[0], by_name(**inputs)[0])
    assert aot_eager_inductor.sparse == [True, True]


def test_torchs_own_arguments_are_handed_on(eager_inductor: Any) -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            return x + 1

    model = sparse_compile.compile(Broken(), fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        model(torch.ones(1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "o9"}, "preset must be one of .*, got 'o9'"),
        ({"presets": "o2"}, r"unknown option 'presets' \(did you mean 'preset'\?\)"),
        ({"options": {"start_step": 2.5}}, "start_step as a float is a fraction"),
        ({"options": ["o2"]}, "options must be a dict"),
        ({"options": {"preset": "o2"}, "strict": True}, "options are given once: put strict into options"),
        ({"mode": "max-autotune"}, r"as inductor=\{\.\.\.\}"),
        ({"options": {"mode": "max-autotune"}}, r"as inductor=\{\.\.\.\}"),
        ({"layer_sparsity": {"mlp": 97}}, r"must lie in \[0, 1\), got 97: a fraction, so 0.97\?"),
    ],
)
def test_a_wrong_option_is_an_error_at_once(arguments: dict[str, Any], message: str) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=message):
        sparse_compile.compile(model, **arguments)
    assert backend_name(model) is None


def test_a_function_is_told_of_torch_compile() -> None:
    with pytest.raises(ValueError, match=r"got function; a function is compiled by torch\.compile\(function, backend="):
        sparse_compile.compile(lambda x: x)  # type: ignore[type-var]


def test_a_sparsity_that_is_no_percentage_has_no_suggestion() -> None:
    with pytest.raises(ValueError, match=r"got 100$"):
        SparseLoRAConfig(layer_sparsity={"mlp": 100})
