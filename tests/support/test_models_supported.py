"""The support matrix, models: each row trains sparsely as the oracle says, and with nothing asked for as it is.

`docs/support.md` is written from these rows (`support_table.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import fx

import held_rows
from model_zoo import DECLINED, MODELS, ModelRow
from oracle import assert_same_step, sparse_step, told, train_step
from sparse_compile.compiler.backend import sparselora
from sparse_compile.reference import masked_dense
from sparse_compile.training.session import session_for
from support_rows import exists
from support_table import PAGE, support_page
from sweeps import sweep
from tolerances import Tolerance

HF_FP64 = Tolerance(max=1e-5, rms=1e-5, why="Hugging Face's norms compute in fp32 whatever the dtype.")


def compiled(model: torch.nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="sparselora", dynamic=False, options={"strict": True, **options})


@pytest.mark.parametrize("name", sweep(MODELS, "llama", "mixtral"))
def test_a_model_trains_as_the_oracle_says(name: str, aot_eager_inductor: Any) -> None:
    row = MODELS[name]
    model, inputs = row.build().to(row.dtype), row.inputs()
    call = compiled(model, preset="none", layer_sparsity=dict.fromkeys(row.sites, 0.5))
    step, kept = sparse_step(model, call, inputs)
    assert sorted(next(s for s in row.sites if site.endswith(s)) for site in kept) == sorted(row.sites)
    with masked_dense(row.oracle_sites(model, kept), row.roles(inputs["labels"])):
        expected = train_step(model, model, inputs)
    assert_same_step(step, expected, row.dtype, tolerance=HF_FP64 if row.dtype == torch.float64 else None)
    assert (train_step(model, model, inputs).loss - step.loss).abs() > 1e-6, "sparsity changes nothing here"
    dense = layers_outside(model, kept)
    assert all(any(part in name for part in row.stays) for name in dense), dense
    assert all(any(part in name for name in dense) for part in row.stays), dense
    reports = session_for([parameter for parameter in model.parameters() if parameter.requires_grad]).reports
    # AOTAutograd may have Dynamo trace the frame again (a number that it makes a tensor of): then there are two, alike.
    for words in row.stays.values():
        assert any(words in each.reason for each in reports[-1].rejections)


def layers_outside(model: torch.nn.Module, sites: Iterable[str]) -> set[str]:
    """Return the modules with frozen matrices that are in no sparse site; embeddings and the head are no part of it."""
    found = set()
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        is_matrix = parameter.dim() > 1 and not parameter.requires_grad
        table = isinstance(model.get_submodule(owner), torch.nn.Embedding)
        if is_matrix and not table and not any(f"{site}." in name for site in sites):
            found.add(owner)
    return {name for name in found if not name.endswith(("lm_head", "embed_out", "head"))}


@pytest.mark.parametrize("name", sweep([*MODELS, *DECLINED], "llama"))
def test_where_nothing_is_asked_for_inductor_has_what_was_captured(name: str, eager_inductor: Any) -> None:
    """The very graph, untouched: what Inductor makes of it is then what it makes without this backend, bit for bit."""
    row = {**MODELS, **DECLINED}[name]
    model, inputs = row.build().to(row.dtype), row.inputs()
    captured: list[tuple[fx.GraphModule, str]] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        captured.append((gm, str(gm.graph)))
        return sparselora(gm, example_inputs, options={"preset": "none", "strict": True})

    torch.compile(model, backend=backend, dynamic=False)(**inputs)
    assert captured and len(eager_inductor.graphs) == len(captured)
    for compiled_graph, (gm, text) in zip(eager_inductor.graphs, captured, strict=True):
        assert compiled_graph is gm and str(gm.graph) == text


@pytest.mark.parametrize("name", sweep(DECLINED, "phi3_dora"))
def test_a_model_that_is_declined_trains_dense_and_says_so(name: str, aot_eager_inductor: Any) -> None:
    row: ModelRow = DECLINED[name]
    model, inputs = row.build().to(row.dtype), row.inputs()
    call = torch.compile(model, backend="sparselora", options={"preset": "none", "layer_sparsity": {"mlp": 0.5}})
    reason = row.declined
    with told() as messages:
        # A graph that reads images may be one of several: only when it runs again is it known that no other follows.
        for _ in range(3):
            train_step(model, call, inputs)
    # Where no site has the name asked for, another line says that.
    (message,) = (each for each in messages if "so training runs dense" in each)
    assert reason in message
    assert not any(aot_eager_inductor.sparse)


@pytest.mark.slow
def test_fused_projections_through_inductor() -> None:
    row = MODELS["gpt_neox"]
    model, inputs = row.build().to(row.dtype), row.inputs()
    call = compiled(model, preset="exact", layer_sparsity=dict.fromkeys((s for s in row.sites if "att" in s), 0.5))
    step, kept = sparse_step(model, call, inputs)
    with masked_dense(row.oracle_sites(model, kept), row.roles(inputs["labels"])):
        expected = train_step(model, model, inputs)
    assert_same_step(step, expected, torch.float64, tolerance=HF_FP64)


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == support_page(), "run `make support`"


def test_rows_that_are_held_elsewhere_are_tests() -> None:
    rows = (*held_rows.ADAPTERS, *held_rows.TRAINING, *held_rows.SHAPES, *held_rows.DISTRIBUTED, *held_rows.CHANGES)
    assert [row.test for row in rows if not exists(row.test)] == []
