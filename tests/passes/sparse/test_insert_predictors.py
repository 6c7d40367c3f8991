"""The inserted predictors choose what the oracle's scores choose, and leave the model's own function alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import CheckpointPolicy

from graphs import (
    ANALYSES,
    Captured,
    Head,
    aot_eager,
    assert_golden,
    capture,
    causal_loss,
    frozen,
    gradients_of,
    render,
    run_passes,
    run_rewritten,
    targets,
    tokens,
)
from models import batch, fp64_decoder
from sparse_compile.kernels.channel_selection import record_channels
from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.passes.protocol import PassOutcome
from sparse_compile.reference import (
    ffn_scores,
    kept_count,
    output_mask_from_labels,
    query_key_scores,
    scored_positions,
    top_channels,
    value_scores,
)
from sweeps import slow
from tolerances import assert_close_rms

PASS = "insert_predictors"
TOP = torch.ops.sparselora.top_channels.default


class Plain(nn.Module):
    """A block without gate, adapters on nothing but the head."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.scale = nn.Parameter(torch.empty(16))
        frozen(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.dropout(F.gelu(self.up(x)) * self.scale, 0.5))


def insert(model: nn.Module, *args: Tensor, dynamic: Any = (), **options: Any) -> tuple[Captured, PassOutcome]:
    captured = capture(model, *args, config=SparseLoRAConfig(**options), dynamic=dynamic)
    return captured, run_passes(captured, *ANALYSES, PASS)[PASS]


def test_golden() -> None:
    captured, outcome = insert(Head(Plain()), *tokens(), layer_sparsity={"body.0": 0.75})
    assert outcome.changed and outcome.stats["predictors"] == 1
    assert_golden(PASS, render(captured))


def test_nothing_planned_nothing_inserted() -> None:
    captured, outcome = insert(Head(Plain()), *tokens(), preset="exact")
    assert not outcome.changed and captured.ctx.facts.selections == {} and captured.ctx.facts.rows is None


def test_one_split_for_all_sites_and_choices_that_are_saved() -> None:
    inputs = batch(61, padding="left")
    sites = {"0.mlp": 0.5, "1.mlp": 0.5, "1.self_attn": 0.5}
    captured, outcome = insert(fp64_decoder(), inputs["input_ids"], inputs["labels"], layer_sparsity=sites)
    assert outcome.stats["predictors"] == 3
    assert targets(captured.gm).count("split_tokens") == 1
    choices = [node for node in captured.gm.graph.nodes if node.target is TOP]
    assert len(choices) == 4 and all(node.meta["recompute"] is CheckpointPolicy.MUST_SAVE for node in choices)
    names = {node.name for node in captured.gm.graph.nodes}
    assert {name for chosen in captured.ctx.facts.selections.values() for name in chosen} <= names
    assert {len(chosen) for site, chosen in captured.ctx.facts.selections.items() if "mlp" in site} == {1}


def test_the_models_function_is_unchanged() -> None:
    model, (ids, labels) = Head(Plain()).eval(), tokens()
    model.body[0].forward = lambda x, m=model.body[0]: m.down(F.gelu(m.up(x)) * m.scale)  # type: ignore[method-assign]
    config = SparseLoRAConfig(layer_sparsity={"body.0": 0.75})
    ran = run_rewritten(model, ids, labels, config=config, only=(*ANALYSES, PASS), compiler=aot_eager)
    expected = gradients_of(model(ids, labels), model)
    for name, gradient in gradients_of(ran.value, model).items():
        assert_close_rms(gradient, expected[name], name=name)


def input_of(model: nn.Module, path: str, inputs: dict[str, Tensor]) -> Tensor:
    """Return what a module reads in an eager forward."""
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(**inputs)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("kind", ["mlp", "self_attn"])
@pytest.mark.parametrize("predictor_tokens", ["mean", slow("all"), slow(3)])
@pytest.mark.parametrize("padding", [None, "left"])
def test_choices_are_those_of_the_oracle(predictor_tokens: Any, padding: str | None, kind: str) -> None:
    """One site alone: it reads what the dense model computes."""
    model = fp64_decoder(bias=True)
    inputs = batch(61, padding=padding)
    site = f"layers.1.{kind}"
    config = SparseLoRAConfig(layer_sparsity={site: 0.6}, predictor_tokens=predictor_tokens)
    with record_channels() as chosen:
        ran = run_rewritten(model, **inputs, config=config)

    def predicted(name: str) -> Callable[[Tensor], Tensor]:
        factors, layer = ran.ctx.facts.factors[f"{site}.{name}"], model.get_submodule(f"{site}.{name}.base_layer")
        return lambda rows: rows @ factors.a.double() @ factors.b.double() + layer.bias

    scored = scored_positions(output_mask_from_labels(inputs["labels"]), inputs.get("attention_mask"))
    if kind == "mlp":
        x = input_of(model, f"{site}.up_proj", inputs)
        projections = [predicted("gate_proj"), predicted("up_proj")]
        scores = ffn_scores(x, scored, projections, model.config.region, predictor_tokens=predictor_tokens)
        expected = {site: top_channels(scores, kept_count(48, 0.6))}
    else:
        x = input_of(model, f"{site}.q_proj", inputs)
        q, k, v = (predicted(f"{name}_proj") for name in "qkv")
        qk = query_key_scores(x, scored, q, k, head_dim=8, groups=2)
        vo = value_scores(x, scored, v)
        expected = {f"{site}:{name}": top_channels(s, kept_count(16, 0.6)) for name, s in (("qk", qk), ("vo", vo))}
    assert set(chosen) == set(expected)
    for name, channels in expected.items():
        assert torch.equal(chosen[name][0], channels), name


def test_first_node_is_the_roles() -> None:
    captured, _ = insert(Head(Plain()), *tokens(), layer_sparsity={"body.0": 0.75})
    assert targets(captured.gm)[:2] == ["output_mask", "split_tokens"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"token_selection": "all_sparse"}, "zeros_like"),
        ({"token_selection": "random_dense"}, "shuffled_mask"),
        ({"channel_selection": "random"}, "rand"),
        ({"predictor_tokens": 2}, "spaced_rows"),
    ],
    ids=str,
)
def test_options(options: dict[str, Any], expected: str) -> None:
    captured, _ = insert(Head(Plain()), *tokens(), layer_sparsity={"body.0": 0.75}, **options)
    assert expected in targets(captured.gm)


def test_labels_made_of_inputs_are_copied_to_the_top() -> None:
    model = Head(Plain(), loss=lambda z, y: masked_loss(z, y))
    captured, _ = insert(model, *tokens(), layer_sparsity={"body.0": 0.75})
    called = targets(captured.gm)
    assert called.count("masked_fill") == 2 and called.index("masked_fill") < called.index("output_mask")
    assert called.index("output_mask") < called.index("embedding")


def masked_loss(logits: Tensor, labels: Tensor) -> Tensor:
    labels = labels.clamp(min=0).masked_fill(labels < 0, -100)
    return F.cross_entropy(logits[:, :-1].reshape(-1, 11), labels[:, 1:].reshape(-1))


def test_declines_given_roles_without_an_input_of_their_shape() -> None:
    """Tokens come in flattened: there is nothing to check the roles against."""
    model = Head(Plain())
    captured = capture(
        lambda ids, labels: model(ids.view(2, 6), labels.view(2, 6)),
        *(each.reshape(-1) for each in tokens()),
        config=SparseLoRAConfig(layer_sparsity={"body.0": 0.5}),
    )
    captured.ctx.env = replace(captured.ctx.env, roles_given=True)
    run_passes(captured, *ANALYSES)
    assert captured.ctx.facts.plan.sparse_sites
    with pytest.raises(ValueError, match="no input of the graph has the shape of the tokens"):
        run_passes(captured, PASS)


def test_dynamic_first_dimension() -> None:
    ids, labels = tokens(rows=3)
    _, outcome = insert(Head(Plain()), ids, labels, dynamic=((ids, 0), (labels, 0)), layer_sparsity={"body.0": 0.75})
    assert outcome.changed


def test_labels_on_another_device_are_moved_to_the_tokens() -> None:
    model = Head(Plain(), loss=lambda logits, labels: causal_loss(logits, labels.to(logits.device)))
    ids, labels = tokens()
    captured, _ = insert(model, ids, labels.to("meta"), layer_sparsity={"body.0": 0.5})
    (mask,) = [n for n in captured.gm.graph.nodes if n.target is torch.ops.sparselora.output_mask.default]
    (moved,) = mask.users
    assert moved.target == "to" and moved.args == (mask, torch.device("cpu"))
    # On one device nothing is moved.
    captured, _ = insert(model, ids, labels, layer_sparsity={"body.0": 0.5})
    (mask,) = [n for n in captured.gm.graph.nodes if n.target is torch.ops.sparselora.output_mask.default]
    assert "to" not in {user.target for user in mask.users}
