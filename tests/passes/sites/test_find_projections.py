"""Frozen linear layers and their LoRA branches, as PEFT and as people write them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from graphs import Captured, capture, rejections, run_passes
from models import normal
from sparse_compile.compiler.peft_support import make_dora_traceable
from sparse_compile.graph.sites import Projection
from sparse_compile.passes.protocol import PassOutcome

PASSES = ("canonicalize_linears", "find_projections")


def find(function: Callable[..., Tensor], *args: Tensor, **kwargs: object) -> tuple[Captured, PassOutcome]:
    captured = capture(function, *args, **kwargs)  # type: ignore[arg-type]
    return captured, run_passes(captured, *PASSES)["find_projections"]


def only(captured: Captured) -> Projection:
    (projection,) = captured.ctx.facts.projections.values()
    return projection


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.q_proj(x))


def peft_model(dtype: torch.dtype = torch.float32, autocast_adapter: bool = True, **options: object) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"], **options)
    make_dora_traceable()
    return get_peft_model(TwoLayers().to(dtype), config, autocast_adapter_dtype=autocast_adapter).train()


def test_vanilla_lora() -> None:
    captured, outcome = find(peft_model(), torch.ones(2, 3, 4))
    projection = only(captured)
    assert projection.name == "base_model.model.q_proj"
    assert (projection.in_features, projection.out_features, projection.transposed) == (4, 6, False)
    assert projection.bias is not None
    (branch,) = projection.branches
    assert branch.dropout is None and projection.output != projection.base
    assert outcome.stats == {"projections": 1, "branches": 1} and not outcome.rejections


@pytest.mark.parametrize(
    ("options", "branches"),
    [
        ({"lora_dropout": 0.1}, 1),
        ({"use_rslora": True}, 1),
        ({"lora_bias": True}, 1),
    ],
    ids=["dropout", "rslora", "lora_bias"],
)
def test_peft_variants(options: dict[str, object], branches: int) -> None:
    captured, _ = find(peft_model(**options), torch.ones(2, 3, 4))
    found = only(captured).branches
    assert len(found) == branches
    assert (found[0].dropout is not None) == ("lora_dropout" in options)


def test_dropout_that_is_off_is_no_dropout() -> None:
    captured, _ = find(peft_model(lora_dropout=0.1).eval(), torch.ones(2, 3, 4))
    assert only(captured).branches[0].dropout is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_adapters(dtype: torch.dtype) -> None:
    from peft import LoraConfig

    model = peft_model(dtype)
    model.add_adapter("second", LoraConfig(r=3, lora_alpha=3, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    captured, _ = find(model, torch.ones(2, 3, 4, dtype=dtype))
    assert len(only(captured).branches) == 2


def test_casts_between_a_bf16_base_and_fp32_adapters() -> None:
    model = peft_model(torch.bfloat16)
    assert model.base_model.model.q_proj.lora_A["default"].weight.dtype == torch.float32
    captured, _ = find(model, torch.ones(2, 3, 4, dtype=torch.bfloat16))
    assert len(only(captured).branches) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_dora(dropout: float, dtype: torch.dtype) -> None:
    captured, outcome = find(peft_model(dtype, use_dora=True, lora_dropout=dropout), torch.ones(2, 3, 4, dtype=dtype))
    projection = only(captured)
    (term,) = projection.dora
    assert projection.branches == () and projection.adapters == (term.branch,)
    assert outcome.stats == {"projections": 1, "branches": 1} and not outcome.rejections
    assert (term.branch.dropout is not None) == (term.product is not None) == bool(dropout)
    assert (term.unbiased is None) == bool(dropout)
    assert projection.products == (projection.base, *([term.product] if dropout else []))
    by_name = {node.name: node for node in captured.gm.graph.nodes}
    addition = by_name[projection.output]
    assert addition.args[0] is by_name[projection.base] and by_name[term.branch.output].args[1] == 4.0


def test_dora_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        captured, _ = find(peft_model(use_dora=True), torch.ones(2, 3, 4))
    assert len(only(captured).dora) == 1


@pytest.mark.parametrize("second", [True, False], ids=["dora", "lora"])
@pytest.mark.parametrize("first", [True, False], ids=["dora", "lora"])
def test_two_adapters_some_of_them_dora(first: bool, second: bool) -> None:
    from peft import LoraConfig

    model = peft_model(use_dora=first)
    model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj"], use_dora=second))
    model.base_model.set_adapter(["default", "second"])
    captured, _ = find(model, torch.ones(2, 3, 4))
    projection = only(captured)
    assert len(projection.dora) == first + second and len(projection.adapters) == 2
    assert next(iter(captured.gm.graph.output_node().all_input_nodes)).args[0].name == projection.output


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_dora_on_conv1d(dropout: float) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    base = nn.Sequential(Conv1D(6, 4), nn.LayerNorm(6))
    config = LoraConfig(r=2, target_modules=["0"], use_dora=True, fan_in_fan_out=True, lora_dropout=dropout)
    model = get_peft_model(base, config)
    make_dora_traceable()
    captured, _ = find(model, torch.ones(2, 3, 4))
    projection = only(captured)
    assert projection.transposed and len(projection.dora) == 1
    assert len(projection.products) == (2 if dropout else 1)


@pytest.mark.parametrize("how", ["merged", "disabled"])
def test_merged_and_disabled_adapters_leave_a_bare_layer(how: str) -> None:
    model = peft_model()
    if how == "merged":
        model.merge_adapter()
    else:
        model.base_model.disable_adapter_layers()
    captured, outcome = find(model, torch.ones(2, 3, 4))
    projection = only(captured)
    assert projection.branches == () and projection.output == projection.base
    assert not outcome.rejections


def test_conv1d_is_stored_transposed() -> None:
    from transformers.pytorch_utils import Conv1D

    captured, _ = find(Conv1D(6, 4).requires_grad_(False), torch.ones(2, 3, 4))
    projection = only(captured)
    assert projection.transposed and (projection.in_features, projection.out_features) == (4, 6)


class ByHand(nn.Module):
    """A frozen product and a low-rank product, combined by a function."""

    def __init__(self, combine: Callable[[ByHand, Tensor], Tensor]):
        super().__init__()
        self.combine = combine
        self.w = nn.Parameter(normal(6, 4), requires_grad=False)
        self.a = nn.Parameter(normal(4, 2))  # (in, r)
        self.b = nn.Parameter(normal(2, 6))  # (r, out)
        self.v = nn.Parameter(normal(6))
        self.bias = nn.Parameter(normal(6), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.combine(self, x)

    def base(self, x: Tensor) -> Tensor:
        return x @ self.w.t()


BRANCHES: dict[str, tuple[Callable[[ByHand, Tensor], Tensor], int]] = {
    "scaled at the end": (lambda m, x: m.base(x) + x @ m.a @ m.b * 0.5, 1),
    "scaled in between": (lambda m, x: m.base(x) + (x @ m.a) * 0.5 @ m.b, 1),
    "branch first": (lambda m, x: x @ m.a @ m.b + m.base(x), 1),
    "scale first": (lambda m, x: m.base(x) + 2.0 * (x @ m.a @ m.b), 1),
    "torch.add": (lambda m, x: torch.add(m.base(x), x @ m.a @ m.b), 1),
    "torch.add with alpha": (lambda m, x: torch.add(m.base(x), x @ m.a @ m.b, alpha=2), 1),
    "in place with alpha": (lambda m, x: m.base(x).add_(x @ m.a @ m.b, alpha=0.5), 1),
    "divided": (lambda m, x: m.base(x) + x @ m.a / 4 @ m.b / 3, 1),
    "einsum": (lambda m, x: m.base(x) + torch.einsum("bsr,ro->bso", torch.einsum("bsi,ir->bsr", x, m.a), m.b), 1),
    "in place": (lambda m, x: m.base(x).add_(x @ m.a @ m.b), 1),
    "twice": (lambda m, x: m.base(x) + x @ m.a @ m.b + 0.1 * (x @ m.a @ m.b), 2),
    # Near misses: the branch is not one of this layer's.
    "another input": (lambda m, x: m.base(x) + (x + 1) @ m.a @ m.b, 0),
    "something nonlinear in between": (lambda m, x: m.base(x) + (x @ m.a).relu() @ m.b, 0),
    "scaled by a tensor of its own": (lambda m, x: m.base(x) + (x @ m.a @ m.b) * x.sum(), 0),
    "scaled by a number that is added": (lambda m, x: torch.add(m.base(x), 2.0, alpha=2), 0),
    "the base read twice": (lambda m, x: (y := m.base(x)) + x @ m.a @ m.b + y.relu(), 0),
    "a number added": (lambda m, x: m.base(x) + 1.0, 0),
    "a residual": (lambda m, x: m.base(x) + m.base(x), 0),
}


def low(m: ByHand, x: Tensor) -> Tensor:
    return x @ m.a @ m.b


def biased(m: ByHand, x: Tensor) -> Tensor:
    return F.linear(x, m.w, m.bias)


DORA: dict[str, tuple[Callable[[ByHand, Tensor], Tensor], int]] = {
    "a vector of one dimension": (lambda m, x: (y := m.base(x)) + ((m.v - 1) * y + m.v * low(m, x)), 1),
    "branch first": (lambda m, x: (y := m.base(x)) + (low(m, x) * 0.5 * m.v + y * (m.v - 1)), 1),
    "sum first": (lambda m, x: ((m.v - 1) * (y := m.base(x)) + m.v * low(m, x)) + y, 1),
    "a bias taken off": (lambda m, x: (y := biased(m, x)) + ((m.v - 1) * (y - m.bias) + m.v * low(m, x)), 1),
    "a bias left on": (lambda m, x: (y := biased(m, x)) + ((m.v - 1) * y + m.v * low(m, x)), 1),
    # Near misses.
    "a scale of the tokens": (lambda m, x: (y := m.base(x)) + ((x.mean((0, 1)).sum() * m.v) * y + m.v * low(m, x)), 0),
    "a scale of each token": (
        lambda m, x: (
            (y := m.base(x)) + ((m.v * (places := torch.arange(1.0, 4.0)[:, None]) - 1) * y + m.v * places * low(m, x))
        ),
        0,
    ),
    "one scale for all channels": (lambda m, x: (y := m.base(x)) + ((m.v.sum() - 1) * y + m.v.sum() * low(m, x)), 0),
    "the base read once more": (lambda m, x: (y := m.base(x)) + ((m.v - 1) * y + m.v * low(m, x)) + y.relu(), 0),
    "another tensor taken off": (lambda m, x: (y := biased(m, x)) + ((m.v - 1) * (y - m.v) + m.v * low(m, x)), 0),
    "the bias taken off twice": (
        lambda m, x: (y := biased(m, x)) + ((m.v - 1) * torch.sub(y, m.bias, alpha=2) + m.v * low(m, x)),
        0,
    ),
    "another product": (lambda m, x: m.base(x) + ((m.v - 1) * m.base(x.relu()) + m.v * low(m, x)), 0),
    "an adapter of another tensor": (lambda m, x: (y := m.base(x)) + ((m.v - 1) * y + m.v * low(m, x + 1)), 0),
    "no adapter": (lambda m, x: (y := m.base(x)) + (m.v * y + m.v * y.relu()), 0),
    "three terms": (lambda m, x: (y := m.base(x)) + ((m.v - 1) * y + m.v * low(m, x) + m.v), 0),
    "a term taken off": (lambda m, x: (y := m.base(x)) - ((m.v - 1) * y + m.v * low(m, x)), 0),
    "a difference": (lambda m, x: (y := m.base(x)) + ((m.v - 1) * y - m.v * low(m, x)), 0),
}


@pytest.mark.parametrize("name", DORA)
def test_dora_written_by_hand(name: str) -> None:
    function, count = DORA[name]
    captured, outcome = find(ByHand(function), normal(2, 3, 4))
    projection = next(iter(captured.ctx.facts.projections.values()))
    assert len(projection.dora) == count and not projection.branches and not outcome.rejections
    if not count:
        assert projection.output == projection.base


FROZEN_BRANCHES: dict[str, tuple[Callable[[ByHand, Tensor], Tensor], int]] = {
    "behind the layer": (lambda m, x: m.base(x) + x @ m.a @ m.b * 0.5, 1),
    "before the layer": (lambda m, x: 0.5 * (x @ m.a @ m.b) + m.base(x), 1),
    "DoRA's": (lambda m, x: (y := m.base(x)) + ((m.v - 1) * y + m.v * low(m, x)), 1),
    # Near misses: layers of their own.
    "added to nothing": (lambda m, x: m.base(x).sin() + x @ m.a @ m.b, 0),
    "of another input": (lambda m, x: m.base(x) + (x + 1) @ m.a @ m.b, 0),
}


@pytest.mark.parametrize("trained", [(), ("b",)], ids=["frozen", "B trained"])
@pytest.mark.parametrize("name", FROZEN_BRANCHES)
def test_frozen_branches(name: str, trained: tuple[str, ...]) -> None:
    function, count = FROZEN_BRANCHES[name]
    module = ByHand(function).requires_grad_(False)
    for factor in trained:
        getattr(module, factor).requires_grad_(True)
    captured, outcome = find(module, normal(2, 3, 4))
    layers = captured.ctx.facts.projections.values()
    assert outcome.stats["branches"] == count and not outcome.rejections
    assert all(branch.trained == bool(trained) for layer in layers for branch in layer.adapters)
    assert [layer.name for layer in layers if layer.name != "w"] == ([] if count else ["a", "b"][: 2 - len(trained)])


def test_frozen_layers_that_are_as_wide_as_what_they_are_added_to_are_no_branch() -> None:
    module = ByHand(lambda m, x: m.base(x) + x @ m.a @ m.b)
    module.a, module.b = nn.Parameter(normal(4, 4)), nn.Parameter(normal(4, 6))
    captured, outcome = find(module.requires_grad_(False), normal(2, 3, 4))
    assert outcome.stats == {"projections": 3, "branches": 0}
    assert {each.name for each in captured.ctx.facts.projections.values()} == {"w", "a", "b"}


@pytest.mark.parametrize("name", BRANCHES)
def test_branches_written_by_hand(name: str) -> None:
    function, count = BRANCHES[name]
    captured, outcome = find(ByHand(function), normal(2, 3, 4))
    projection = next(iter(captured.ctx.facts.projections.values()))
    assert len(projection.branches) == count and not outcome.rejections
    nodes = {node.name for node in captured.gm.graph.nodes}
    for branch in projection.branches:
        assert {branch.a, branch.b, branch.output} <= nodes


FORMED: dict[str, tuple[Callable[[ByHand, Tensor], Tensor], str]] = {
    "x @ (A @ B)": (lambda m, x: m.base(x) + x @ (m.a @ m.b), "Write (x @ A) @ B"),
    "scaled": (lambda m, x: 0.5 * (x @ (m.a @ m.b * 2)) + m.base(x), "Write (x @ A) @ B"),
    "linear": (lambda m, x: m.base(x) + F.linear(x, (m.a @ m.b).t()), "Write (x @ A) @ B"),
    "merged": (lambda m, x: F.linear(x, m.w + (m.a @ m.b).t()), "Write x @ W + (x @ A) @ B"),
}


@pytest.mark.parametrize("name", FORMED)
def test_an_adapter_that_is_formed_in_full_is_named_with_a_way_out(name: str) -> None:
    function, way_out = FORMED[name]
    _, outcome = find(ByHand(function), normal(2, 3, 4))
    (rejection,) = (each for each in outcome.rejections if each.node == "w")
    assert rejection.reason.endswith(way_out)


@pytest.mark.parametrize("name", ["two products", "a frozen matrix"])
def test_what_is_no_adapter_formed_in_full(name: str) -> None:
    functions: dict[str, Callable[[ByHand, Tensor], Tensor]] = {
        "two products": lambda m, x: m.base(x) + x @ (x.sum(1).T @ (x.sum(1) @ m.a @ m.b)),
        "a frozen matrix": lambda m, x: m.base(x) + x @ (m.w.t() * 2),
    }
    _, outcome = find(ByHand(functions[name]), normal(2, 3, 4))
    assert all(each.node != "w" for each in outcome.rejections)


def test_declines_a_computed_weight() -> None:
    _, outcome = find(ByHand(lambda m, x: F.linear(x, m.w * 2)), normal(2, 4))
    assert rejections(outcome) == ["its weight is computed in the graph, not a parameter"]


def test_declines_a_weight_that_is_not_at_hand() -> None:
    captured = capture(ByHand(ByHand.base), normal(2, 4))
    ctx = captured.ctx
    from dataclasses import replace

    parameters = {name: replace(parameter, value=None) for name, parameter in ctx.env.parameters.items()}
    ctx.env = replace(ctx.env, parameters=parameters)
    assert rejections(run_passes(captured, *PASSES)["find_projections"]) == [
        "its weight is not at hand while compiling"
    ]


def test_a_trained_layer_is_none() -> None:
    model = ByHand(ByHand.base)
    model.w.requires_grad_(True)
    captured, outcome = find(model, normal(2, 4))
    assert not captured.ctx.facts.projections and not outcome.rejections


def test_repeated_and_idempotent_and_dynamic() -> None:
    x = normal(5, 4)
    captured, outcome = find(ByHand(lambda m, x: m.base(x) * m.base(x.relu())), x, dynamic=((x, 0),))
    assert outcome.stats["projections"] == 2
    first = dict(captured.ctx.facts.projections)
    run_passes(captured, "find_projections")
    assert captured.ctx.facts.projections == first


def test_unrelated_graph() -> None:
    captured, outcome = find(ByHand(lambda m, x: x @ x.T), normal(3, 4))
    assert not captured.ctx.facts.projections and not outcome.rejections
