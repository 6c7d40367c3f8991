"""Graphs of parts of a model: what their sites are called, how deep they stand, and that none is taken for another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from decoder import fp64_decoder
from graphs import gradients_of
from sparse_compile import SparseLoRAConfig, explain, token_roles
from sparse_compile.compiler.model_part import ModelPart, part_of
from sparse_compile.kernels.roles.given import current_roles
from sparse_compile.training.label_roles import LabelRoles
from sparse_compile.training.session import session_for

SPARSE = SparseLoRAConfig(layer_sparsity={"layers.0.mlp": 0.75, "layers.1.self_attn": 0.5}, start_step=0).to_options()


@pytest.fixture
def op_by_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile as nothing: the rewritten graph is run by autograd."""
    monkeypatch.setattr("sparse_compile.compiler.executable.compile_with_inductor", lambda gm, *_: gm.forward)


def batch() -> dict[str, Tensor]:
    ids = torch.randint(1, 61, (2, 10), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :6] = -100
    return {"input_ids": ids, "labels": labels}


def parts(compile_parts: Callable[[Callable[..., Any]], None], call: Callable[[], object]) -> list[ModelPart | None]:
    """Return the part of each graph that is compiled."""
    found: list[ModelPart | None] = []

    def backend(gm: fx.GraphModule, _: object) -> Callable[..., Any]:
        found.append(part_of(gm))
        return gm.forward

    compile_parts(backend)
    call()
    return found


def places(found: list[ModelPart | None]) -> list[tuple[str, int, int]]:
    return [(each.path, each.position, each.count) for each in found if each is not None]


class Broken(nn.Module):
    """A block whose forward breaks the graph between attention and feed-forward."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        x = x + self.block.self_attn(self.block.input_layernorm(x), *rest)
        torch._dynamo.graph_break()
        return x + self.block.mlp(self.block.post_attention_layernorm(x))


def test_a_whole_model_is_no_part() -> None:
    model = fp64_decoder(layers=1)
    found = parts(lambda backend: model.compile(backend=backend), lambda: model(**batch()))
    assert places(found) == [("", 0, 1)]


def test_a_block_compiled_alone_knows_its_place() -> None:
    model = fp64_decoder(layers=3)

    # One alone: without the backend's identity guards one compilation would serve all.
    found = parts(lambda backend: model.layers[1].compile(backend=backend), lambda: model(**batch()))
    assert places(found) == [("layers.1", 1, 3)]
    assert found[0] is not None and found[0].model is model


@pytest.mark.usefixtures("op_by_op")
def test_blocks_compiled_one_by_one_train_as_the_whole_does() -> None:
    inputs, losses = batch(), []
    for compile_blocks in (False, True):
        model = fp64_decoder(layers=2)
        for module in model.layers if compile_blocks else [model]:
            module.compile(backend="sparselora", options=SPARSE)
        with token_roles(labels=inputs["labels"]):
            loss = model(**inputs)[0]
            losses.append((loss, gradients_of(loss, model)))
        session = session_for([each for each in model.parameters() if each.requires_grad])
        sites = {site.name: site.sparsity for report in session.reports for site in report.sites}
        assert {name: sparsity for name, sparsity in sites.items() if sparsity} == {
            "layers.0.mlp": 0.75, "layers.1.self_attn": 0.5
        }  # fmt: skip
    (whole, expected), (blocks, actual) = losses
    torch.testing.assert_close(blocks, whole)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient)
    assert (whole - fp64_decoder(layers=2)(**inputs)[0]).abs() > 1e-6


def test_a_part_behind_a_graph_break_has_the_name_it_has_in_the_model() -> None:
    model = fp64_decoder(layers=2)
    model.layers = nn.ModuleList(Broken(layer) for layer in model.layers)
    report = explain(model, config={"layer_sparsity": {"layers.1.block.mlp": 0.5}}, **batch())
    names = {site.name for site in report.sites}
    assert {"layers.0.block.mlp", "layers.1.block.self_attn"} <= names


def test_wrappers_stand_in_no_path() -> None:
    model = fp64_decoder(layers=2)

    def wrap(backend: Callable[..., Any]) -> None:
        model.layers[1] = torch.compile(model.layers[1], backend=backend)

    assert places(parts(wrap, lambda: model(**batch()))) == [("layers.1", 0, 1)]


def test_encoder_blocks_are_no_part_of_the_decoders_stack() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(*(Block() for _ in range(2)))
            self.decoder = nn.Sequential(*(Block() for _ in range(3)))

        def forward(self, x: Tensor) -> Tensor:
            return self.decoder(self.encoder(x))

    model = Pair()
    found = parts(lambda backend: model.decoder[1].compile(backend=backend), lambda: model(torch.ones(1, 2)))
    assert places(found) == [("decoder.1", 1, 3)]


def test_outside_of_a_compilation_there_is_no_part() -> None:
    assert part_of(fx.symbolic_trace(nn.Linear(2, 2))) is None


# --- Roles from the labels of a call ----------------------------------------------------------------------------------


class Seen(nn.Module):
    """Notes the roles that its forward sees."""

    def forward(self, labels: Tensor | None = None) -> None:
        self.roles = current_roles()


def test_labels_open_roles_from_the_forward_until_they_are_closed() -> None:
    model, labels = Seen(), batch()["labels"]
    roles = LabelRoles(model)
    model(labels=labels)
    assert model.roles is not None
    assert model.roles[0].tolist() == [False] * 5 + [True] * 5
    assert current_roles() is model.roles
    roles.close()
    assert current_roles() is None
    model()
    with torch.no_grad():
        model(labels=labels)
    assert model.roles is None
    roles.remove()
    model(labels=labels)
    assert model.roles is None


def test_a_second_forward_before_the_backward_is_refused_where_a_checkpoint_would_read_its_roles() -> None:
    model, labels = Seen(), batch()["labels"]
    roles = LabelRoles(model)
    try:
        model(labels=labels)
        model(labels=labels)  # without checkpoints nothing reads roles in the backward
        model.gradient_checkpointing = True
        with pytest.raises(RuntimeError, match="two training forwards"):
            model(labels=labels)
    finally:
        roles.remove()
    assert current_roles() is None
