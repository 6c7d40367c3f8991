"""Pruned layers keep their zeros: equal to a plain masked layer, in both phases, and declined with a reason."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F  # noqa: N812

from decoder import LoRALinear
from graphs import (
    ANALYSES,
    Head,
    aot_eager,
    assert_golden,
    capture,
    frozen,
    gradients_of,
    lora,
    rejections,
    render,
    run_passes,
    run_rewritten,
    stand_in_pass,
    tokens,
)
from models import normal, random_mask
from sparse_compile import explain
from sparse_compile.compiler.peft_support import make_dora_traceable
from sparse_compile.compiler.pipeline import EVALUATION_PASSES, PASSES
from sparse_compile.compiler.runner import run_pipeline
from sparse_compile.kernels.masked_linear.pattern import mask_pattern, zero_fraction
from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.passes.context import PassContext
from sparse_compile.passes.protocol import PassOutcome, RequestedFunctionError
from tolerances import assert_close_rms

PASS = "preserve_weight_mask"
EXACT = SparseLoRAConfig(preserve_weight_mask="auto", mask_gradient="exact", preset="none")
PAPER = SparseLoRAConfig(preserve_weight_mask="auto", preset="none")


def prune(weight: Tensor, seed: int = 3) -> None:
    weight.data.mul_(random_mask(*weight.shape, seed=seed))


class Layer(nn.Module):
    """A pruned layer with an adapter, and a function of it and of x."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor] | None = None, *, bias: bool = True):
        super().__init__()
        self.layer = LoRALinear(nn.Linear(16, 12, bias=bias), 4, 1.5)
        self.function = function or (lambda m, x: m.layer(x))
        frozen(self)
        prune(self.layer.base_layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x.tanh())


def masked(module: LoRALinear, x: Tensor) -> Tensor:
    weight = module.base_layer.weight
    merged = (weight + module.scale * module.lora_B @ module.lora_A) * (weight != 0)
    return F.linear(x, merged, module.base_layer.bias)


def branch(m: Any, x: Tensor) -> Tensor:
    return F.linear(F.linear(x, m.layer.lora_A), m.layer.lora_B) * 1.5


def given() -> Tensor:
    return normal(2, 5, 16).requires_grad_()


def test_golden() -> None:
    captured = capture(Layer(), given(), config=PAPER)
    outcome = run_passes(captured, *ANALYSES, PASS)[PASS]
    assert outcome.stats == {"masked": 1, "declined": 0} and not outcome.rejections
    assert_golden(PASS, render(captured))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_the_masked_function_and_its_gradients(bias: bool) -> None:
    """With preset `none` too: the option is what asks for it."""
    module, x = Layer(bias=bias), given()
    ran = run_rewritten(module, x, config=EXACT)
    expected = masked(module.layer, x.tanh())
    assert_close_rms(ran.value, expected)
    actual = gradients_of(ran.value.sin().sum(), module, x)
    for name, gradient in gradients_of(expected.sin().sum(), module, x).items():
        assert_close_rms(actual[name], gradient, name=name)


def test_a_layer_that_runs_twice() -> None:
    def twice(m: Any, x: Tensor) -> Tensor:
        return m.layer(F.pad(m.layer(x), (0, 4)))

    module, x = Layer(twice), given()
    ran = run_rewritten(module, x, config=EXACT)
    assert [layer.reason for layer in ran.ctx.facts.masked_layers] == ["", ""]
    assert_close_rms(ran.value, masked(module.layer, F.pad(masked(module.layer, x.tanh()), (0, 4))))


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another"])
def test_a_weight_decomposed_adapter_is_declined(beside: bool) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(nn.Sequential(nn.Linear(16, 12)), LoraConfig(r=4, target_modules=["0"], use_dora=True))
    if beside:
        model.add_adapter("second", LoraConfig(r=4, target_modules=["0"]))
        model.base_model.set_adapter(["default", "second"])
    prune(model.base_model.model[0].base_layer.weight)
    make_dora_traceable()
    outcome = run_passes(capture(model.train(), given().float(), config=PAPER), *ANALYSES, PASS)[PASS]
    (reason,) = rejections(outcome)
    assert reason.startswith("its adapter is weight-decomposed (DoRA)") and not outcome.changed


def test_off_by_default() -> None:
    captured = capture(Layer(), given())
    outcome = run_passes(captured, *ANALYSES, PASS)[PASS]
    assert not outcome.changed and not outcome.rejections


def test_evaluation_is_masked_too() -> None:
    captured = capture(Layer(), given(), config=PAPER)
    result = run_pipeline(captured.gm, captured.ctx, order=EVALUATION_PASSES)
    assert result.exact is not None and "masked_linear" in str(result.exact.graph)


NEAR_MISSES: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "dropout": (
        lambda m, x: m.layer.base_layer(x) + branch(m, F.dropout(x, 0.5, True)),
        "the adapter's input is dropped out: the layer's is not, so the two cannot be merged",
    ),
    "two adapters": (lambda m, x: m.layer(x) + branch(m, x), "it has several adapters"),
    "a tied weight": (
        lambda m, x: m.layer(x) + m.layer.base_layer.weight.sum(),
        "something else reads its weight (a tied embedding?), and would change with a merge",
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name: str) -> None:
    function, reason = NEAR_MISSES[name]
    captured = capture(Layer(function), given(), config=PAPER)
    outcome = run_passes(captured, *ANALYSES, PASS)[PASS]
    assert not outcome.changed and rejections(outcome) == [reason]
    assert [layer.reason for layer in captured.ctx.facts.masked_layers] == [reason]


def test_a_layer_that_is_not_pruned() -> None:
    captured = capture(Layer(), given(), config=SparseLoRAConfig(preserve_weight_mask="auto", mask_threshold=0.9))
    outcome = run_passes(captured, *ANALYSES, PASS)[PASS]
    assert rejections(outcome) == ["less than 90% of its weight is zero"] and not captured.ctx.facts.masked_layers


def test_a_site_with_a_masked_layer_stays_dense() -> None:
    class MLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = lora(8, 12), lora(12, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.relu(self.up(x)))

    model = Head(MLP(), MLP())
    prune(model.body[0].up.base_layer.weight)
    options: dict[str, Any] = {"layer_sparsity": {"body.0": 0.5, "body.1": 0.5}, "preset": "none"}
    captured = capture(model, *tokens(rows=9), config=SparseLoRAConfig(preserve_weight_mask="auto", **options))
    result = run_pipeline(captured.gm, captured.ctx)
    assert result.sparse is not None and [plan.sparse for plan in captured.ctx.facts.plan.sites] == [False, True]
    assert any("keep the zeros" in each.reason and each.node == "body.0" for each in result.rejections)


# --- A function that was asked for is never left out ------------------------------------------------------------------


def lost(gm: fx.GraphModule, ctx: PassContext) -> PassOutcome:
    raise RuntimeError("lost the thread")


def illegal(gm: fx.GraphModule, ctx: PassContext) -> PassOutcome:
    """Leave a node that no pass has signed."""
    output = gm.graph.output_node()
    with gm.graph.inserting_before(output):
        gm.graph.call_function(torch.sin, (output.args[0][0],))
    return PassOutcome(True)


@pytest.mark.parametrize(
    ("name", "function", "reason"),
    [
        (PASS, lost, "RuntimeError: lost the thread"),
        (PASS, illegal, "internal error: sin was inserted without a tag"),
        ("find_projections", lost, "it needs projections"),
    ],
    ids=["raises", "illegal graph", "an analysis raises"],
)
@pytest.mark.filterwarnings("ignore:sparselora. find_projections failed")
def test_a_failure_is_an_error(name: str, function: Any, reason: str) -> None:
    captured = capture(Layer(), given(), config=PAPER)
    order = [stand_in_pass(function, each) if each.name == name else each for each in PASSES]
    with pytest.raises(RequestedFunctionError, match=f"preserve_weight_mask failed.* than the one asked for. {reason}"):
        run_pipeline(captured.gm, captured.ctx, order=order)
    assert "masked_linear" not in str(captured.gm.graph)


def test_an_analysis_that_is_left_out_is_an_error() -> None:
    """Without projections there is nothing to mask, and nothing would be said."""
    captured = capture(Layer(), given(), config=replace(PAPER, disable=frozenset({"find_projections"})))
    with pytest.raises(RequestedFunctionError, match="it needs projections"):
        run_pipeline(captured.gm, captured.ctx)


def test_another_failure_is_no_error_where_no_mask_was_asked_for() -> None:
    captured = capture(Layer(), given(), config=SparseLoRAConfig(preset="none"))
    order = [stand_in_pass(lost, each) if each.name == "find_projections" else each for each in PASSES]
    with pytest.warns(UserWarning, match="find_projections failed, the pass is left out"):
        run_pipeline(captured.gm, captured.ctx, order=order)


def test_a_masked_graph_that_does_not_compile_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def inductor(gm: fx.GraphModule, inputs: Any, *_: Any) -> Any:
        if "masked_linear" in str(gm.graph):
            raise NotImplementedError("no code for it")
        return aot_eager(gm, inputs)

    monkeypatch.setattr("sparse_compile.compiler.executable.compile_with_inductor", inductor)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="NotImplementedError: no code for it") as told:
        compiled(Layer(), preserve_weight_mask="auto")(given())
    assert isinstance(told.value.inner_exception, RequestedFunctionError)
    compiled(Layer())(given())


def test_asking_for_it_and_leaving_it_out_is_an_error() -> None:
    with pytest.raises(ValueError, match="asks for the pass that disable leaves out"):
        SparseLoRAConfig(preserve_weight_mask="auto", disable=frozenset({PASS}))


# --- Through the backend ----------------------------------------------------------------------------------------------


def compiled(module: nn.Module, **options: Any) -> Any:
    return torch.compile(module, backend="sparselora", options={"preset": "exact", **options})


def repeat(call: Callable[[Tensor], Tensor], x: Tensor) -> None:
    for _ in range(3):
        call(x)


def test_training_and_evaluation_compute_the_masked_function(aot_eager_inductor: Any) -> None:
    module, x = Layer(), given()
    call = compiled(module, preserve_weight_mask="auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close_rms(call(x), masked(module.layer, x.tanh()))
        with torch.no_grad():
            assert_close_rms(call(x), masked(module.layer, x.tanh()))
    assert aot_eager_inductor.runs == [1, 1]


@pytest.mark.parametrize("grad", [True, False])
def test_adapters_that_are_only_evaluated_are_masked(aot_eager_inductor: Any, grad: bool) -> None:
    """Frozen, as `PeftModel.from_pretrained` loads them, whether or not gradients are on."""
    module, x = Layer().requires_grad_(False), given()
    with warnings.catch_warnings(), torch.set_grad_enabled(grad):
        warnings.simplefilter("error")
        y = compiled(module, preserve_weight_mask="auto")(x)
    assert_close_rms(y, masked(module.layer, x.tanh()))


def test_a_frozen_adapter_is_masked_while_others_train() -> None:
    """As in evaluation: what is merged is what was computed. Its factors get no gradient."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.trained = Layer(), Layer()
            self.frozen.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.frozen(x) + self.trained(x)

    module, x = Two(), given()
    ran = run_rewritten(module, x, config=EXACT)
    expected = masked(module.frozen.layer, x.tanh()) + masked(module.trained.layer, x.tanh())
    assert_close_rms(ran.value, expected)
    actual = gradients_of(ran.value.sin().sum(), module, x)
    assert set(actual) == {"trained.layer.lora_A", "trained.layer.lora_B", "0"}
    for name, gradient in gradients_of(expected.sin().sum(), module, x).items():
        assert_close_rms(actual[name], gradient, name=name)


@pytest.mark.parametrize("trained", [True, False])
def test_evaluation_without_a_mask_is_told_once(aot_eager_inductor: Any, trained: bool) -> None:
    module = Layer(NEAR_MISSES["two adapters"][0])
    if not trained:
        module.requires_grad_(False)
    call = compiled(module, preserve_weight_mask="auto")
    with torch.no_grad(), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for rows in (2, 3):
            call(normal(rows, 5, 16))
    (one,) = told
    assert "a merge fills their zeros:\n  layer: it has several adapters" in str(one.message)


@pytest.mark.parametrize("how", ["in place", "through data"])
def test_a_weight_that_stays_pruned_keeps_the_zeros_that_there_are_now(
    aot_eager_inductor: Any, how: str, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    module, x = Layer(), given()
    call = compiled(module, preserve_weight_mask="auto")
    call(x)
    weight, mask = module.layer.base_layer.weight, random_mask(12, 16, seed=9)
    with torch.no_grad(), caplog.at_level(logging.INFO, logger="sparse_compile"):
        (weight if how == "in place" else weight.data).mul_(mask)
    with caplog.at_level(logging.INFO, logger="sparse_compile"):
        repeat(call, x)
    assert_close_rms(call(x), masked(module.layer, x.tanh()))
    told = [record for record in caplog.records if "changed after their zeros were counted" in record.message]
    assert len(told) == 1 and len(aot_eager_inductor.graphs) == 1 and not recwarn.list


def test_a_layer_that_ceases_to_be_pruned_is_compiled_anew(aot_eager_inductor: Any) -> None:
    """And one that becomes pruned has a mask from the next step on."""
    module, x = Layer(), given()
    call = compiled(module, preserve_weight_mask="auto")
    call(x)
    zeros = module.layer.base_layer.weight == 0
    with torch.no_grad():
        module.layer.base_layer.weight[zeros] = 0.5
    with pytest.warns(UserWarning, match="1 layers became pruned, or ceased to be(?s:.*)the next one is compiled anew"):
        call(x)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert_close_rms(call(x), module(x))
    assert len(aot_eager_inductor.graphs) == 2 and not any("became pruned" in str(each.message) for each in told)
    with torch.no_grad():
        module.layer.base_layer.weight[zeros] = 0.0
    with pytest.warns(UserWarning, match="1 layers became pruned, or ceased to be"):
        call(x)
    assert_close_rms(call(x), masked(module.layer, x.tanh()))


def test_a_model_without_zeros_is_told_once(aot_eager_inductor: Any) -> None:
    module, x = Layer(), given()
    call = compiled(module, preserve_weight_mask="auto", mask_threshold=0.9)
    with pytest.warns(UserWarning, match="found no pruned layer with an adapter(?s:.*)less than 90%") as told:
        repeat(call, x)
    assert len(told) == 1


def test_a_pruned_layer_without_a_mask_is_told_once(aot_eager_inductor: Any) -> None:
    call = compiled(Layer(NEAR_MISSES["dropout"][0]), preserve_weight_mask="auto")
    with pytest.warns(UserWarning, match="a merge fills their zeros(?s:.*)dropped out") as told:
        repeat(call, given())
    assert len(told) == 1


def test_the_report_lists_zeros_and_pattern() -> None:
    report = explain(Layer(), given(), config=PAPER)
    (graph,) = report.graphs
    (layer,) = graph.masks
    assert layer.projection == "layer" and 0.3 < layer.sparsity < 0.5 and layer.pattern == "unstructured"
    assert f"{layer.sparsity:.1%}" in str(report) and "kept" in str(report)
    assert graph.flops_after - graph.flops_before == layer.added_flops != 0


def test_patterns() -> None:
    dense = normal(8, 32).abs() + 1
    two_of_four = dense * torch.tensor([1.0, 0, 0, 1]).repeat(8)
    assert mask_pattern(two_of_four) == "2:4" and zero_fraction(two_of_four) == 0.5
    assert mask_pattern(dense * torch.tensor([1.0, 0, 1, 1, 1, 0, 0, 0]).repeat(4)) == "4:8"
    assert mask_pattern(dense * random_mask(8, 32)) == "unstructured" == mask_pattern(dense)
