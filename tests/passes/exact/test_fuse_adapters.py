"""Adapters of one tensor become one product; loss and gradients stay those of eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from decoder import Fp64Decoder, fp64_decoder, variants
from graphs import (
    ANALYSES,
    Captured,
    Head,
    aot_eager,
    assert_golden,
    assert_like_masked_dense,
    capture,
    frozen,
    gradients_of,
    graph_eager,
    lora,
    rejections,
    render,
    run_passes,
    run_rewritten,
    targets,
    tokens,
)
from models import BATCHES, batch, normal, tiny_llama, with_lora
from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.passes.protocol import PassOutcome
from sparse_compile.reference import MaskedFFN
from sweeps import slow, sweep
from tolerances import Tolerance, assert_close_rms

PASS = "fuse_adapters"
EXACT = (*ANALYSES, PASS)


class Layers(nn.Module):
    """Layers with adapters of several ranks, and a function of them and of x."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor] | None = None, **layers: nn.Module):
        super().__init__()
        self.q, self.k, self.v = lora(8, 12, bias=True), lora(8, 4, rank=3), lora(8, 4)
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.function = function or attention_inputs
        frozen(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def attention_inputs(m: Any, x: Tensor) -> Tensor:
    return torch.cat([m.q(x), m.k(x), m.v(x)], dim=-1).sin()


def given(*shape: int) -> Tensor:
    return normal(*(shape or (2, 30, 8))).requires_grad_()


def fuse(function: Callable[..., Any], *args: Tensor, **options: Any) -> tuple[Captured, PassOutcome]:
    captured = capture(function, *args, **options)
    return captured, run_passes(captured, *EXACT)[PASS]


def check(
    module: nn.Module,
    *inputs: Tensor,
    adapters: int,
    tolerance: Tolerance | None = None,
    compiler: Callable[..., Any] = graph_eager,
) -> None:
    """Assert that so many adapters are fused, and that values and gradients are those of eager."""
    seed = torch.get_rng_state()
    ran = run_rewritten(module, *inputs, only=EXACT, compiler=compiler)
    actual = gradients_of(ran.value.sum(), module, *(x for x in inputs if x.requires_grad))
    torch.set_rng_state(seed)
    expected = module(*inputs)
    (record,) = (record for record in ran.result.records if record.name == PASS)
    assert record.stats["adapters"] == adapters, ran.result.rejections
    assert_close_rms(ran.value, expected, tolerance=tolerance)
    for name, gradient in gradients_of(expected.sum(), module, *(x for x in inputs if x.requires_grad)).items():
        assert_close_rms(actual[name], gradient, tolerance=tolerance, name=name)


# --- What is fused ----------------------------------------------------------------------------------------------------


def test_golden() -> None:
    captured, outcome = fuse(Layers(), given())
    assert outcome.changed and outcome.stats == {"groups": 1, "adapters": 3} and not outcome.rejections
    assert_golden(PASS, render(captured))


def test_values_and_gradients() -> None:
    check(Layers(), given(), adapters=3, compiler=aot_eager)


def test_an_input_without_a_gradient() -> None:
    check(Layers(), normal(2, 30, 8), adapters=3)


def test_two_groups() -> None:
    """Projections of two tensors, and one more of the first behind them."""

    def two(m: Any, x: Tensor) -> Tensor:
        y = x.sin()
        return m.q(x) + m.up(m.k(y)) + m.v(y).sum() + m.last(x)

    check(Layers(two, up=lora(4, 12), last=lora(8, 12)), given(), adapters=4)


def test_several_adapters_of_one_layer() -> None:
    def two(m: Any, x: Tensor) -> Tensor:
        first, second = m.q, m.v
        low, other = F.linear(x, first.lora_A), F.linear(x, second.lora_A)
        return first.base_layer(x) + F.linear(low, first.lora_B) * 2.0 + F.linear(other, second.lora_B) * 0.5

    check(Layers(two, v=lora(8, 12, rank=5)), given(), adapters=2)


def test_frozen_factors_are_not_stacked_with_trained_ones() -> None:
    """A stack of both would have the gradient of the frozen ones computed, and dropped."""

    def some(m: Any, x: Tensor) -> Tensor:
        return attention_inputs(m, x) + m.last(x).sum()

    module = Layers(some, last=lora(8, 4, rank=1))
    for layer in (module.k, module.last):
        layer.requires_grad_(False)
    check(module, given(), adapters=4)
    captured, _ = fuse(module, normal(2, 30, 8))
    stacks = [node for node in captured.gm.graph.nodes if node.name.startswith("split_with_sizes")]
    assert [node.meta["example_value"][0].requires_grad for node in stacks] == [True, False]


def test_a_product_that_is_read_twice() -> None:
    def twice(m: Any, x: Tensor) -> Tensor:
        low = F.linear(x, m.q.lora_A)
        return m.q.base_layer(x) + F.linear(low, m.q.lora_B) * 2.0 + m.k(x).sum() + low.sin().sum()

    check(Layers(twice), given(), adapters=2)


def test_one_dropout_for_all() -> None:
    """One draw, read by all of them, is one tensor."""

    def shared(m: Any, x: Tensor) -> Tensor:
        dropped = F.dropout(x, 0.5, True)
        outs = [F.linear(F.linear(dropped, layer.lora_A), layer.lora_B) * 2.0 for layer in (m.q, m.k, m.v)]
        return torch.cat([m.q.base_layer(x) + outs[0], m.k.base_layer(x) + outs[1], m.v.base_layer(x) + outs[2]], -1)

    check(Layers(shared), given(), adapters=3)


def test_factors_that_are_stored_transposed() -> None:
    class Transposed(nn.Module):
        def __init__(self, outputs: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(outputs, 8))
            self.lora_A, self.lora_B = nn.Parameter(torch.empty(8, 3)), nn.Parameter(torch.empty(3, outputs))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight) + x @ self.lora_A @ self.lora_B * 2.0

    check(Layers(q=Transposed(12), k=Transposed(4), v=Transposed(4)), given(), adapters=3)


def test_additions_in_place() -> None:
    """What is written to is the base product, not the tensor that the adapters read."""

    class InPlace(nn.Module):
        def __init__(self, outputs: int) -> None:
            super().__init__()
            self.layer = lora(8, outputs)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer.base_layer(x)
            y += F.linear(F.linear(x, self.layer.lora_A), self.layer.lora_B) * 2.0
            return y

    check(Layers(q=InPlace(12), k=InPlace(4), v=InPlace(4)), given(), adapters=3)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_bias": True}], ids=str)
def test_peft(options: dict[str, Any]) -> None:
    from peft import LoraConfig, get_peft_model

    model = Layers(q=nn.Linear(8, 12), k=nn.Linear(8, 4), v=nn.Linear(8, 4))
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["q", "k", "v"], **options))
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    check(peft_model.train(), given(), adapters=3)


def test_fp32_adapters_on_a_bf16_base() -> None:
    """Each layer casts x for itself: three casts of one tensor."""
    model = with_lora(tiny_llama(layers=1, dtype=torch.bfloat16), ("q_proj", "k_proj", "v_proj"))
    captured = capture(model, **batch(97))
    assert targets(captured.gm).count("to") >= 3
    outcome = run_passes(captured, *EXACT)[PASS]
    assert outcome.stats == {"groups": 1, "adapters": 3}


@pytest.mark.parametrize("name", sweep(variants(), "gqa"))
def test_decoders(name: str) -> None:
    config = variants()[name]
    model = Fp64Decoder(config)
    _, outcome = fuse(lambda **inputs: model(**inputs)[0], **batch(61))
    a_layer = 3 + (2 if config.gated and "gate_proj" in config.adapters else 0)
    groups = config.layers * (1 + (a_layer == 5))
    assert outcome.stats == {"groups": groups, "adapters": config.layers * a_layer}
    inputs = batch(61)
    ran = run_rewritten(lambda **inputs: model(**inputs)[0], **inputs, only=EXACT)
    expected = model(**inputs)[0]
    assert_close_rms(ran.value, expected)
    actual = gradients_of(ran.value, model)
    for parameter, gradient in gradients_of(expected, model).items():
        assert_close_rms(actual[parameter], gradient, name=parameter)


def test_a_dynamic_first_dimension() -> None:
    x = given(5, 6, 8)
    captured, outcome = fuse(Layers(), x, dynamic=((x, 0), (x, 1)))
    assert outcome.stats["adapters"] == 3
    stacked = next(node for node in captured.gm.graph.nodes if node.name == "split_with_sizes").args[0]
    assert isinstance(stacked.meta["example_value"].shape[0], torch.SymInt)


def test_a_second_run_changes_nothing() -> None:
    captured, _ = fuse(Layers(), given())
    outcome = run_passes(captured, PASS)[PASS]
    assert not outcome.changed and not outcome.rejections


def test_the_product_counts_as_before() -> None:
    from sparse_compile.graph.flops import step_flops

    captured = capture(Layers(), given())
    run_passes(captured, *ANALYSES)
    before = step_flops(captured.gm.graph).total
    run_passes(captured, PASS)
    assert step_flops(captured.gm.graph).total == before


# --- What is not ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.q.base_layer(x) + m.k.base_layer(x).sum(),
        lambda m, x: m.q(x),
        lambda m, x: m.q(x) + m.k(x.sin()).sum() + m.v(x.cos()).sum(),
    ],
    ids=["no adapters", "one adapter", "three tensors"],
)
def test_nothing_to_fuse(function: Callable[[Any, Tensor], Tensor]) -> None:
    _, outcome = fuse(Layers(function), given())
    assert not outcome.changed and not outcome.rejections


def test_dropouts_of_their_own() -> None:
    def dropped(m: Any, x: Tensor) -> Tensor:
        outs = [F.linear(F.linear(F.dropout(x, 0.5, True), p.lora_A), p.lora_B) * 2.0 for p in (m.q, m.k)]
        return m.q.base_layer(x) + outs[0] + (m.k.base_layer(x) + outs[1]).sum()

    _, outcome = fuse(Layers(dropped), given())
    assert not outcome.changed
    assert rejections(outcome) == [
        "its dropout draws for it alone: its input is another tensor than that of the adapters beside it"
    ] * 2  # fmt: skip
    assert [rejection.node for rejection in outcome.rejections] == ["q", "k"]


def test_a_bias_of_a_factor() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.lora_bias = lora(8, 4), nn.Parameter(torch.empty(2))

        def forward(self, x: Tensor) -> Tensor:
            low = F.linear(x, self.layer.lora_A, self.lora_bias)
            return self.layer.base_layer(x) + F.linear(low, self.layer.lora_B) * 2.0

    _, outcome = fuse(Layers(v=Biased()), given())
    assert rejections(outcome) == ["its A has a bias"] and outcome.stats["adapters"] == 2
    check(Layers(v=Biased()), given(), adapters=2)


def test_other_dtypes() -> None:
    def cast(m: Any, x: Tensor) -> Tensor:
        low = F.linear(x.float(), m.v.lora_A.float())
        return m.q(x) + m.k(x).sum() + (m.v.base_layer(x) + F.linear(low, m.v.lora_B.float()) * 2.0).sum()

    _, outcome = fuse(Layers(cast), given())
    reason = "its dtype, region of autocast, checkpoint or training is another than that of the adapters beside it"
    assert rejections(outcome) == [reason] and outcome.stats["adapters"] == 2


def test_another_region_of_autocast() -> None:
    def mixed(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            q = m.q(x)
        return q.double() + m.k(x).sum() + m.v(x).sum()

    _, outcome = fuse(Layers(mixed), given())
    assert len(outcome.rejections) == 1 and outcome.stats["adapters"] == 2
    assert "region of autocast" in rejections(outcome)[0]


def test_another_checkpoint() -> None:
    def parts(m: Any, x: Tensor) -> Tensor:
        q, k, v = (checkpoint(layer, x, use_reentrant=False) for layer in (m.q, m.k, m.v))
        return torch.cat([q, k, v], -1)

    captured = capture(Layers(parts), given())
    outcome = run_passes(captured, "inline_checkpoint_bodies", *EXACT)[PASS]
    assert len(outcome.rejections) == 3 and not outcome.changed


def test_within_a_checkpoint() -> None:
    module = Layers(lambda m, x: checkpoint(attention_inputs, m, x, use_reentrant=False))
    x = given()
    ran = run_rewritten(module, x, only=("inline_checkpoint_bodies", *EXACT), compiler=aot_eager)
    assert {record.name: record.stats for record in ran.result.records}[PASS]["adapters"] == 3
    expected = module(x)
    assert_close_rms(ran.value, expected)
    actual = gradients_of(ran.value.sum(), module, x)
    for name, gradient in gradients_of(expected.sum(), module, x).items():
        assert_close_rms(actual[name], gradient, name=name)


@pytest.mark.parametrize("how", ["method", "function", "operator", "item", "view", "flag", "out"])
def test_an_input_that_is_written_to_in_between(how: str) -> None:
    def written(m: Any, x: Tensor) -> Tensor:
        y = x * 1.5
        q = m.q(y)
        if how == "method":
            y.mul_(2.0)
        elif how == "function":
            torch.relu_(y)
        elif how == "operator":
            y += 1.0
        elif how == "item":
            y[0] = 0.0
        elif how == "view":
            y.view(-1, 8).neg_()
        elif how == "flag":
            F.silu(y, inplace=True)
        else:
            torch.sin(x, out=y)
        return q + m.k(y).sum()

    _, outcome = fuse(Layers(written), normal(2, 30, 8))
    assert not outcome.changed
    if how != "operator":  # Dynamo calls the sum by another name: the two adapters read two tensors
        assert ["written to in between" in reason for reason in rejections(outcome)] == [True]


def test_a_product_that_is_written_to() -> None:
    def written(m: Any, x: Tensor) -> Tensor:
        low = F.linear(x, m.q.lora_A)
        low.mul_(2.0)
        return m.q.base_layer(x) + F.linear(low, m.q.lora_B) + m.k(x).sum() + m.v(x).sum()

    _, outcome = fuse(Layers(written), given())
    assert rejections(outcome) == ["the product with its A is written to in place"] and outcome.stats["adapters"] == 2


def test_too_few_tokens() -> None:
    _, outcome = fuse(Layers(), given(1, 2, 8))
    assert not outcome.changed
    assert rejections(outcome) == ["stacking their factors moves more bytes than reading their input once saves"]


# --- Beside sparsity --------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    """A gated feed-forward block; its out-projection has two adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = lora(8, 12, rank=3, bias=True), lora(8, 12), lora(12, 8)
        self.other = lora(12, 8, rank=3)
        frozen(self)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.gate(x)) * self.up(x)
        return self.down(h) + F.linear(F.linear(h, self.other.lora_A), self.other.lora_B) * 0.5


def test_a_sparse_block_keeps_what_its_gathers_need() -> None:
    model, (ids, labels) = Head(MLP()), tokens(rows=5)
    config = SparseLoRAConfig(layer_sparsity={"body.0": 0.75}, disable=("order_adapter_products",))
    captured = capture(model, ids, labels, config=config)
    outcome = run_passes(captured, *EXACT)[PASS]
    assert outcome.stats == {"groups": 1, "adapters": 2}
    assert rejections(outcome) == ["its block is sparse: the columns of its A are gathered"] * 2
    dense = capture(model, ids, labels, config=SparseLoRAConfig(preset="exact"))
    assert run_passes(dense, *EXACT)[PASS].stats == {"groups": 2, "adapters": 4}


def test_a_sparse_block_is_that_of_the_oracle() -> None:
    class Plain(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.silu(self.gate(x)) * self.up(x))

    model, (ids, labels) = Head(lora(8, 8), Plain()), tokens(rows=5)
    ran = assert_like_masked_dense(
        model,
        ids,
        labels,
        labels=labels,
        config=SparseLoRAConfig(layer_sparsity={"body.1": 0.75}),
        sites=lambda kept: [MaskedFFN(model.body[1].down, kept["body.1"])],
    )
    records = {record.name: record for record in ran.result.records}
    assert records[PASS].stats["adapters"] == 2 and records["sparsify_ffn"].changed


# --- Beside the other exact passes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "disabled", [pytest.param((), id="all"), slow(("order_adapter_products",), id="without merging")]
)
@pytest.mark.parametrize("name", sweep([*BATCHES, "one row of the loss"], "left"))
def test_all_exact_passes_together(name: str, disabled: tuple[str, ...]) -> None:
    """The last block's adapters read rows of the loss, whose number is known at run time only."""
    model = fp64_decoder(layers=2)
    inputs = batch(61, **BATCHES.get(name, {}))
    if name not in BATCHES:
        inputs["labels"][:, 1:] = -100
        inputs["labels"][1, 5] = 7
    ran = run_rewritten(
        lambda **inputs: model(**inputs)[0],
        **inputs,
        config=SparseLoRAConfig(preset="exact", disable=disabled),
        compiler=aot_eager if name == "ragged" else graph_eager,
    )
    records = {record.name: record for record in ran.result.records}
    assert records["select_loss_rows"].changed and records[PASS].stats["groups"] >= (4 if disabled else 1)
    expected = model(**inputs)[0]
    assert_close_rms(ran.value, expected)
    actual = gradients_of(ran.value, model)
    for parameter, gradient in gradients_of(expected, model).items():
        assert_close_rms(actual[parameter], gradient, name=parameter)
