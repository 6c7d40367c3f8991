"""The plan follows the options, the depth, the cost model and what is known about tokens and weights."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from graphs import ANALYSES, Captured, Head, capture, frozen, lora, rejections, run_passes, tokens
from models import batch, fp64_decoder
from sparse_compile.graph.cost import Gain, gain
from sparse_compile.graph.facts import SitePlan
from sparse_compile.graph.sites import AttentionSite, Projection
from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.options.presets import kept_count
from sparse_compile.passes.protocol import PassOutcome
from sparse_compile.passes.roles import plan_sparsity

INPUTS = batch(61)


class MLP(nn.Module):
    def __init__(self, hidden: int = 8, ffn: int = 16):
        super().__init__()
        self.gate, self.up, self.down = lora(hidden, ffn), lora(hidden, ffn), lora(ffn, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def plan(model: nn.Module, *args: Tensor, **options: Any) -> tuple[Captured, PassOutcome]:
    captured = capture(model, *(args or tokens()), config=SparseLoRAConfig(**options))
    return captured, run_passes(captured, *ANALYSES)["plan_sparsity"]


def by_name(captured: Captured) -> dict[str, SitePlan]:
    return {each.site.name: each for each in captured.ctx.facts.plan.sites}


def test_named_sites_and_the_rest_stay_dense() -> None:
    captured, outcome = plan(Head(MLP(), MLP()), layer_sparsity={"1": 0.75})
    sites = by_name(captured)
    assert (sites["body.1"].sparsity, sites["body.1"].kept, sites["body.1"].total) == (0.75, 4, 16)
    assert not sites["body.0"].sparse and sites["body.0"].kept == 16
    assert outcome.stats == {"sparse": 1, "dense": 1} and not outcome.rejections
    assert set(captured.ctx.facts.factors) == {"body.1.gate", "body.1.up"}


def test_the_most_specific_name_wins() -> None:
    captured, _ = plan(Head(MLP(), MLP()), layer_sparsity={"body.0": 0.5, "0": 0.25, "1": 0.25})
    assert {name: each.sparsity for name, each in by_name(captured).items()} == {"body.0": 0.5, "body.1": 0.25}


@pytest.mark.parametrize(("sparsity", "kept"), [(0.0, 16), (0.01, 16), (0.0625, 15), (0.29, 12), (0.999, 1)])
def test_kept_counts(sparsity: float, kept: int) -> None:
    captured, _ = plan(Head(MLP()), layer_sparsity={"body.0": sparsity})
    (site,) = captured.ctx.facts.plan.sites
    assert site.kept == kept and site.sparse == (kept < 16)


@pytest.mark.parametrize(
    ("preset", "ffn", "attention"),
    [
        ("none", {}, {}),
        ("exact", {}, {}),
        # Of 8 blocks, [0.53, 0.97) is 5 to 7 and [0.43, 0.97) is 4 to 7; the first and the last are always dense.
        ("o1", {5: 0.97, 6: 0.97}, {5: 0.2, 6: 0.2}),
        ("o2", dict.fromkeys(range(1, 7), 0.99), {4: 0.75, 5: 0.75, 6: 0.75}),
    ],
)
def test_presets_follow_depth(
    preset: str, ffn: dict[int, float], attention: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_sparsity, "gain", lambda *_: Gain(saved=1, spent=0))
    model = fp64_decoder(layers=8, hidden=8, ffn=16, head_dim=4, vocab=11, adapters=("q_proj",))
    captured, _ = plan(model, *tokens(), preset=preset)
    found: dict[str, dict[int, float]] = {"ffn": {}, "attention": {}}
    for each in captured.ctx.facts.plan.sparse_sites:
        found[each.site.kind][each.site.index] = each.sparsity
    assert found == {"ffn": ffn, "attention": attention}


def test_sites_come_in_graph_order() -> None:
    captured, _ = plan(fp64_decoder(), *INPUTS.values(), layer_sparsity={"0.mlp": 0.5})
    assert list(by_name(captured)) == [f"layers.{i}.{kind}" for i in range(3) for kind in ("self_attn", "mlp")]


# --- Cost -------------------------------------------------------------------------------------------------------------


def test_a_preset_declines_what_does_not_pay() -> None:
    captured, outcome = plan(Head(*(MLP() for _ in range(4))), preset="o2")
    assert not captured.ctx.facts.plan.sparse_sites
    assert len(outcome.rejections) == 2
    for reason in rejections(outcome):
        assert reason.startswith("saves ") and "costs the time of" in reason


def test_a_named_site_is_never_declined_for_cost() -> None:
    captured, outcome = plan(Head(*(MLP() for _ in range(4))), layer_sparsity={"1": 0.99})
    (site,) = captured.ctx.facts.plan.sparse_sites
    assert site.site.name == "body.1" and site.reason.startswith("saves ") and not outcome.rejections


def test_a_preset_takes_what_pays() -> None:
    model = Head(*(MLP(512, 2048) for _ in range(3)), hidden=512)
    captured, outcome = plan(model, preset="o2")
    assert [each.site.name for each in captured.ctx.facts.plan.sparse_sites] == ["body.1"]
    assert not outcome.rejections and captured.ctx.facts.plan.sparse_sites[0].reason == ""


# --- What forbids sparsity --------------------------------------------------------------------------------------------


ALL = {"layer_sparsity": {"body.0": 0.5}}


@pytest.mark.parametrize(("sparsity", "tokens", "pays"), [(0.2, 1024, False), (0.5, 1024, True), (0.2, 16384, True)])
def test_low_sparsity_pays_where_many_tokens_share_the_gathered_weights(
    sparsity: float, tokens: int, pays: bool
) -> None:
    """As measured on two CPU cores with 1024 tokens, hidden 1024 and 16 heads over 4: 0.986x at 0.2, 1.022x at 0.5."""

    def projection(inputs: int, outputs: int) -> Projection:
        return Projection("layer", "base", "x", "weight", False, None, (), "output", inputs, outputs)

    query, key, value, output = (projection(1024, width) for width in (1024, 256, 256, 1024))
    site = AttentionSite("site", 0, "x", query, key, value, output, "attention", 4, 4, 64, 64)
    assert gain(site, kept_count(256, sparsity), 8, 4, "cpu", tokens).pays == pays


def test_declines_without_roles() -> None:
    captured, outcome = plan(Head(MLP(), loss=lambda logits, labels: logits.sum() + labels.sum()), **ALL)
    assert not captured.ctx.facts.plan.sparse_sites
    assert rejections(outcome) == ["nothing tells output tokens from context"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("layer", ["gate", "down"])
def test_declines_a_weight_that_is_not_finite(layer: str, bad: float) -> None:
    model = Head(MLP())
    model.body[0].get_submodule(layer).base_layer.weight.data[0, 0] = bad
    captured, outcome = plan(model, **ALL)
    assert not captured.ctx.facts.plan.sparse_sites and not captured.ctx.facts.factors
    assert rejections(outcome) == [f"the weight of body.0.{layer} is not finite"]


def test_declines_a_site_without_predictor(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_factors(*_: object) -> object:
        raise ValueError("published for another model")

    monkeypatch.setattr(plan_sparsity, "factors_of", no_factors)
    captured, outcome = plan(Head(MLP()), **ALL)
    assert rejections(outcome) == ["no predictor: published for another model"]
    assert not captured.ctx.facts.plan.sparse_sites


class Pooled(nn.Module):
    """Takes every second token, runs a block on those, and gives each token its neighbour's result."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = MLP()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x[:, ::2]).repeat_interleave(2, dim=1)


def test_declines_other_tokens_than_those_of_the_labels() -> None:
    captured, outcome = plan(Head(Pooled()), layer_sparsity={"mlp": 0.5})
    assert rejections(outcome) == ["its tokens (2, 3) are not those of the labels (2, 6)"]
    assert not captured.ctx.facts.plan.sparse_sites


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = MLP()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x.reshape(-1, x.shape[-1])).view(x.shape)


def test_flattened_tokens_are_those_of_the_labels() -> None:
    captured, _ = plan(Head(Flat()), layer_sparsity={"mlp": 0.5})
    assert len(captured.ctx.facts.plan.sparse_sites) == 1


def test_declines_flattened_tokens_for_given_roles() -> None:
    captured = capture(Head(Flat()), *tokens(), config=SparseLoRAConfig(layer_sparsity={"mlp": 0.5}))
    captured.ctx.env = replace(captured.ctx.env, roles_given=True)
    outcome = run_passes(captured, *ANALYSES)["plan_sparsity"]
    assert rejections(outcome) == ["its tokens have no (batch, sequence) shape for the given roles"]


def test_analysis_is_idempotent() -> None:
    captured, _ = plan(Head(MLP()), **ALL)
    first = captured.ctx.facts.plan
    run_passes(captured, "plan_sparsity")
    assert captured.ctx.facts.plan == first


def test_no_sites() -> None:
    captured, outcome = plan(Head(frozen(nn.Linear(8, 8))), **ALL)
    assert captured.ctx.facts.plan.sites == () and not outcome.rejections


def test_dynamic_first_dimension() -> None:
    ids, labels = tokens(rows=3)
    captured = capture(Head(MLP()), ids, labels, config=SparseLoRAConfig(**ALL), dynamic=((ids, 0), (labels, 0)))
    run_passes(captured, *ANALYSES)
    assert len(captured.ctx.facts.plan.sparse_sites) == 1
    assert torch.is_tensor(captured.ctx.facts.factors["body.0.gate"].a)
