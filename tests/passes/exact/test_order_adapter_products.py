"""A layer and its adapter in every order of their products: chosen by cost, equal to eager, merged where legal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from decoder import Fp64Decoder, LoRALinear, variants
from graphs import (
    ANALYSES,
    Captured,
    Head,
    aot_eager,
    assert_golden,
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
from models import batch, normal
from sparse_compile import explain
from sparse_compile.compiler import executable
from sparse_compile.compiler.capture import capture_context
from sparse_compile.compiler.peft_support import make_dora_traceable
from sparse_compile.compiler.pipeline import PASSES
from sparse_compile.compiler.report import plan_data
from sparse_compile.compiler.runner import run_pipeline
from sparse_compile.graph.cost import FLOPS_PER_BYTE, MERGE_MARGIN, TOKENS, association_costs
from sparse_compile.graph.facts import SparsityPlan
from sparse_compile.graph.flops import step_flops
from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.passes.exact.order_adapter_products import break_even
from sparse_compile.passes.protocol import PassOutcome
from sweeps import sweep
from tolerances import assert_close_rms

PASS = "order_adapter_products"
EXACT = (*ANALYSES, PASS)
SHAPES = {"F1B1": (64, 64, 8), "F1B5": (64, 8, 24), "F2B1": (8, 64, 24), "F2B5": (16, 16, 96)}
"""Widths in and out, and a number of tokens for which each order is the cheapest."""


class Layer(nn.Module):
    """A layer with an adapter, and a function of it and of x."""

    def __init__(
        self,
        inputs: int = 16,
        outputs: int = 16,
        function: Callable[[Any, Tensor], Tensor] | None = None,
        *,
        bias: bool = True,
        rank: int = 4,
        scale: float = 1.5,
    ):
        super().__init__()
        self.layer = LoRALinear(nn.Linear(inputs, outputs, bias=bias), rank, scale)
        self.extra = nn.Parameter(torch.empty(outputs))
        self.function = function or (lambda m, x: m.layer(x))
        frozen(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x.tanh())


def given(tokens: int = 96, width: int = 16) -> Tensor:
    return normal(2, tokens // 2, width).requires_grad_()


def any_tokens(x: Tensor) -> Tensor:
    """Have Dynamo take the number of tokens for a symbol."""
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(x, 1)
    return x


def order(function: Callable[..., Any], *args: Tensor, **options: Any) -> tuple[Captured, PassOutcome]:
    captured = capture(function, *args, **options)
    return captured, run_passes(captured, *EXACT)[PASS]


def declined(function: Callable[..., Any], *args: Tensor, **options: Any) -> str:
    captured, outcome = order(function, *args, **options)
    assert not outcome.changed and "merged_linear" not in targets(captured.gm)
    (reason,) = rejections(outcome)
    return reason


def check(module: nn.Module, *inputs: Tensor, compiler: Callable[..., Any] = graph_eager, **orders: int) -> None:
    """Assert that the orders chosen are these, and that values and gradients are those of eager."""
    ran = run_rewritten(module, *inputs, only=EXACT, compiler=compiler)
    (record,) = (record for record in ran.result.records if record.name == PASS)
    assert record.stats == orders, ran.result.rejections
    expected = module(*inputs)
    assert_close_rms(ran.value, expected)
    differentiated = [x for x in inputs if x.requires_grad]
    seed = normal(*expected.shape, seed=5).to(expected.dtype)
    actual = gradients_of((ran.value * seed).sum(), module, *differentiated)
    for name, gradient in gradients_of((expected * seed).sum(), module, *differentiated).items():
        assert_close_rms(actual[name], gradient, name=name)


# --- The four orders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_order_is_eager(name: str, bias: bool, dtype: torch.dtype) -> None:
    inputs, outputs, count = SHAPES[name]
    module = Layer(inputs, outputs, bias=bias).to(dtype)
    x = given(count, inputs).detach().to(dtype).requires_grad_()
    check(module, x, compiler=aot_eager if bias else graph_eager, **{name: 1})


def test_golden() -> None:
    captured, outcome = order(Layer(), given())
    assert outcome.changed and outcome.stats == {"F2B5": 1} and not outcome.rejections
    assert_golden(PASS, render(captured))


def test_what_is_cheapest_as_it_stands_stays() -> None:
    captured = capture(Layer(64, 64), given(8, 64))
    run_passes(captured, *ANALYSES)
    before = render(captured)
    outcome = run_passes(captured, PASS)[PASS]
    assert not outcome.changed and outcome.stats == {"F1B1": 1} and render(captured) == before


def test_the_choice_is_that_of_the_cost_model() -> None:
    for name, (inputs, outputs, count) in SHAPES.items():
        captured, _ = order(Layer(inputs, outputs), given(count, inputs))
        (chosen,) = captured.ctx.facts.product_orders
        costs = association_costs(inputs, outputs, 4, FLOPS_PER_BYTE["cpu"], 8)
        at = {key: float(cost.subs(TOKENS, count)) for key, cost in costs.items()}
        assert chosen.order == name and chosen.tokens == count and chosen.projection == "layer"
        at["F1B1"] *= 1 - MERGE_MARGIN
        assert min(at, key=at.__getitem__) == name
        assert dict(chosen.costs) == {key: str(sympy.expand(cost)) for key, cost in costs.items()}


def test_the_break_even_is_where_the_choice_turns() -> None:
    captured, _ = order(Layer(), given())
    (chosen,) = captured.ctx.facts.product_orders
    assert chosen.break_even.startswith("N > ")
    turn = int(chosen.break_even.removeprefix("N > "))
    for count, merged in ((turn, False), (turn + 1, True)):
        captured, _ = order(Layer(), normal(1, count, 16).requires_grad_())
        assert (captured.ctx.facts.product_orders[0].order != "F1B1") == merged


@pytest.mark.parametrize(
    ("layer", "merged", "expected"),
    [(20, (8, 91), "N > 9"), (20, (8, 89), "N > 8"), (20, (18, 0), "never"), (20, (30, 5), "never")],
)
def test_break_even(layer: int, merged: tuple[int, int], expected: str) -> None:
    """A tenth must be saved: 18 N of 20 N is not enough."""
    costs = {"F1B1": layer * TOKENS, "F2B5": merged[0] * TOKENS + merged[1], "F2B1": 50 * TOKENS}
    assert break_even(costs) == expected


def test_costs_count_the_products_that_run() -> None:
    """FLOPs alone, against what a graph with the layer executes."""
    captured = capture(Layer(bias=False), given())
    run_passes(captured, *ANALYSES)
    found = float(association_costs(16, 16, 4)["F1B1"].subs(TOKENS, 96))
    assert found == float(step_flops(captured.gm.graph).total)


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 8), (8, 64), (32, 32)])
@pytest.mark.parametrize("flops_per_byte", [0.0, 20.0])
def test_merging_pays_from_the_width_of_the_layer_on(inputs: int, outputs: int, flops_per_byte: float) -> None:
    """RunLoRA's rule, N > in forward and N > out backward, holds with bytes too: both sides move alike."""
    costs = association_costs(inputs, outputs, 4, flops_per_byte)
    assert sympy.solve(costs["F1B5"] - costs["F2B5"], TOKENS) == [float(inputs)]
    assert sympy.solve(costs["F2B1"] - costs["F2B5"], TOKENS) == [float(outputs)]


def test_adapters_of_one_tensor_are_compared_as_fused() -> None:
    alone, shared = (association_costs(64, 64, 4, 20.0, readers=readers) for readers in (1, 3))
    assert float((alone["F1B1"] - shared["F1B1"]).subs(TOKENS, 100)) == pytest.approx(20 * 4 * 5 * 64 * 100 * 2 / 3)
    assert all(alone[name] == shared[name] for name in ("F1B5", "F2B1", "F2B5"))


# --- Where it applies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["F2B1", "F2B5"])
def test_an_input_without_a_gradient(name: str) -> None:
    """The order of the backward has no meaning then."""
    inputs, outputs, count = SHAPES[name]
    check(Layer(inputs, outputs), given(count, inputs).detach(), F2B1=1)


def test_scales_on_both_sides_of_b() -> None:
    def scaled(m: Any, x: Tensor) -> Tensor:
        p = m.layer
        return p.base_layer(x) + 3 * F.linear(F.linear(x, p.lora_A) * 0.5, p.lora_B) * 1.5

    captured, _ = order(Layer(16, 16, scaled), given())
    assert "2.25, 'F2B5'" in render(captured)
    check(Layer(16, 16, scaled), given(), F2B5=1)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.layer(x) + m.layer(x).sin().sum() * m.extra,
        lambda m, x: m.layer(m.layer(x)),
        lambda m, x: (y := m.layer(x)) + y.cumsum(1) * x,
    ],
    ids=["one layer twice", "chained", "several users"],
)
def test_layers_that_meet(function: Callable[[Any, Tensor], Tensor]) -> None:
    captured, _ = order(Layer(16, 16, function), given())
    check(Layer(16, 16, function), given(), F2B5=targets(captured.gm).count("merged_linear"))


def test_in_place_additions() -> None:
    def added(m: Any, x: Tensor) -> Tensor:
        y = m.layer.base_layer(x)
        y += F.linear(F.linear(x, m.layer.lora_A), m.layer.lora_B) * 1.5
        return y

    check(Layer(16, 16, added), given(), F2B5=1)


def test_conv1d_and_transposed_factors() -> None:
    from transformers.pytorch_utils import Conv1D

    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = Conv1D(24, 16)
            self.lora_A, self.lora_B = nn.Parameter(torch.empty(16, 3)), nn.Parameter(torch.empty(3, 24))

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + x @ self.lora_A @ self.lora_B * 2.0

    check(frozen(Transposed()), given(), F2B5=1)


def test_a_bias_that_is_trained() -> None:
    module = Layer()
    module.layer.base_layer.bias.requires_grad_(True)
    check(module, given(), F2B5=1)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
def test_peft(options: dict[str, Any]) -> None:
    from peft import LoraConfig, get_peft_model

    model = nn.Sequential(nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    peft_model = get_peft_model(model, LoraConfig(r=4, target_modules=["1", "3"], **options))
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    check(peft_model.train(), given().detach().float().requires_grad_(), F2B5=2)


@pytest.mark.parametrize("name", sweep(variants(), "gqa"))
def test_decoders(name: str) -> None:
    """Grouped heads, biases, every kind of block, with the factors of what is left fused."""
    model, inputs = Fp64Decoder(variants()[name]), batch(61)
    compiler = aot_eager if name == "gqa" else graph_eager
    only = (*EXACT, "fuse_adapters")
    ran = run_rewritten(lambda **inputs: model(**inputs)[0], **inputs, only=only, compiler=compiler)
    (record,) = (record for record in ran.result.records if record.name == PASS)
    assert sum(record.stats.values()) > sum(count for key, count in record.stats.items() if key == "F1B1")
    expected = model(**inputs)[0]
    assert_close_rms(ran.value, expected)
    actual = gradients_of(ran.value, model)
    for parameter, gradient in gradients_of(expected, model).items():
        assert_close_rms(actual[parameter], gradient, name=parameter)


def test_a_dynamic_number_of_tokens() -> None:
    """The choice is made once and right for any number; no guard is added."""
    module, x = Layer(16, 8), given()
    captured, outcome = order(module, x, dynamic=((x, 0), (x, 1)))
    assert outcome.stats == {"F2B5": 1} and captured.ctx.facts.product_orders[0].tokens == 96
    assert not captured.gm.graph.find_nodes(op="call_method", target="size")
    torch._dynamo.reset()
    compilations: list[Any] = []

    def rewritten(gm: Any, example_inputs: Any) -> Any:
        ctx = capture_context(gm, example_inputs, SparseLoRAConfig())
        result = run_pipeline(gm, ctx, order=[each for each in PASSES if each.name in EXACT])
        compilations.append(result)
        return aot_eager(result.exact, example_inputs)

    compiled = torch.compile(module, backend=rewritten, fullgraph=True)
    for rows, length in ((2, 48), (3, 5), (5, 9)):
        x = any_tokens(normal(rows, length, 16).requires_grad_())
        actual, expected = compiled(x), module(x)
        assert_close_rms(actual, expected)
        found = gradients_of(actual.sin().sum(), module, x)
        for name, gradient in gradients_of(expected.sin().sum(), module, x).items():
            assert_close_rms(found[name], gradient, name=name)
    assert len(compilations) == 1


def test_nothing_of_the_weights_size_is_saved() -> None:
    """Neither the op's autograd nor AOTAutograd's partitioner keeps a merged matrix for the backward."""
    module, x = Layer(16, 24, bias=False), given(120)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (saved.append(tensor), tensor)[1], lambda x: x):
        ran = run_rewritten(module, x, only=EXACT, compiler=aot_eager)
    assert {record.name: record.stats for record in ran.result.records}[PASS] == {"F2B5": 1}
    weight = module.layer.base_layer.weight
    as_large = [tensor for tensor in saved if tensor.numel() == weight.numel()]
    assert as_large and all(tensor.data_ptr() == weight.data_ptr() for tensor in as_large)
    ran.value.sum().backward()


def test_a_second_run_changes_nothing() -> None:
    captured, _ = order(Layer(), given())
    outcome = run_passes(captured, PASS)[PASS]
    assert not outcome.changed and not outcome.rejections and not outcome.stats


def test_fused_adapters_are_left_alone() -> None:
    model = Model()
    captured = capture(model, normal(2, 10, 64).float())
    run_passes(captured, *ANALYSES, "fuse_adapters")
    assert rejections(run_passes(captured, PASS)[PASS]) == ["the adapter is fused with others"] * 3


def test_a_graph_without_adapters() -> None:
    captured, outcome = order(Layer(16, 16, lambda m, x: m.layer.base_layer(x) * m.extra), given())
    assert not outcome.changed and not outcome.rejections and captured.ctx.facts.product_orders == ()


# --- Where it does not ------------------------------------------------------------------------------------------------


def branch(m: Any, x: Tensor) -> Tensor:
    return F.linear(F.linear(x, m.layer.lora_A), m.layer.lora_B) * 1.5


def written(m: Any, x: Tensor) -> Tensor:
    y = m.layer.base_layer(x)
    x.neg_()
    return y + branch(m, x)


NEAR_MISSES: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "dropout": (
        lambda m, x: m.layer.base_layer(x) + branch(m, F.dropout(x, 0.5, True)),
        "the adapter's input is dropped out: the layer's is not, so the two cannot be merged",
    ),
    "two adapters": (lambda m, x: m.layer(x) + branch(m, x), "it has several adapters"),
    "a bias of B": (
        lambda m, x: m.layer.base_layer(x)
        + F.linear(F.linear(x, m.layer.lora_A), m.layer.lora_B, m.layer.base_layer.bias) * 1.5,
        "the adapter has a bias",
    ),
    "x A' is read elsewhere": (
        lambda m, x: (
            m.layer.base_layer(x)
            + F.linear(y := F.linear(x, m.layer.lora_A), m.layer.lora_B) * 1.5
            + y.sum()
        ),
        "a product in between is read elsewhere",
    ),
    "the adapter's output is read elsewhere": (
        lambda m, x: (m.layer.base_layer(x) + (y := branch(m, x))) * y.sum(),
        "a product in between is read elsewhere",
    ),
    "a narrower adapter": (
        lambda m, x: (
            m.layer.base_layer(x)
            + F.linear(F.linear(x.float(), m.layer.lora_A.float()), m.layer.lora_B.float()).double()
        ),
        "the layer and its adapter compute in different dtypes",
    ),
    "an input that is written to": (
        lambda m, x: written(m, x * 2.0),
        "its input may be written to in between",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name: str) -> None:
    function, reason = NEAR_MISSES[name]
    assert declined(Layer(16, 16, function), given()) == reason


@pytest.mark.parametrize("first", [False, True], ids=["lora first", "dora first"])
def test_a_weight_decomposed_adapter_beside_another(first: bool) -> None:
    """Nothing is merged there; the layer that has one adapter alone is merged all the same."""
    from peft import LoraConfig, get_peft_model

    layers = nn.Sequential(nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    dora = LoraConfig(r=4, target_modules=["1"], use_dora=True)
    configs = [LoraConfig(r=4, target_modules=["1", "3"]), dora][:: -1 if first else 1]
    model = get_peft_model(layers, configs[0])
    model.add_adapter("second", configs[1])
    model.base_model.set_adapter(["default", "second"])
    make_dora_traceable()
    _, outcome = order(model.train(), given().detach().float().requires_grad_())
    reason = "its adapter is weight-decomposed (DoRA), whose magnitudes scale whole rows of a merged weight"
    assert rejections(outcome) == [reason] and outcome.stats == {"F2B5": 1}


def test_a_base_product_that_is_read_elsewhere_has_no_branch() -> None:
    captured, outcome = order(Layer(16, 16, lambda m, x: (y := m.layer.base_layer(x)) * (y + branch(m, x))), given())
    (projection,) = captured.ctx.facts.projections.values()
    assert not outcome.changed and not projection.branches


def test_a_scale_that_is_a_size() -> None:
    """As `dynamic=True` makes one of every float of a module."""

    def scaled(m: Any, x: Tensor) -> Tensor:
        return m.layer.base_layer(x) + F.linear(F.linear(x, m.layer.lora_A), m.layer.lora_B) * x.shape[1]

    x = given()
    reason = declined(Layer(16, 16, scaled), x, dynamic=((x, 1),))
    assert reason == "the scale is no number"


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_autocast(where: str) -> None:
    module, x = Layer().float(), given().detach().float()

    def inside(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return module(x)

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=where == "outside"):
        reason = declined(module if where == "outside" else inside, x)
    assert reason in (
        "autocast casts its operands, which it does not do for a merged product",
        "the layer and its adapter compute in different dtypes",
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_low_precision_is_the_users_choice(dtype: torch.dtype) -> None:
    module, x = Layer().to(dtype), given().detach().to(dtype).requires_grad_()
    name = str(dtype).removeprefix("torch.")
    assert declined(module, x) == f"a weight merged in {name} is rounded (see merge_low_precision)"
    config = SparseLoRAConfig(merge_low_precision=True)
    _, outcome = order(module, x, config=config)
    assert outcome.stats == {"F2B5": 1}
    if dtype == torch.bfloat16:
        ran = run_rewritten(module, x, only=EXACT, config=config)
        assert_close_rms(ran.value, module.double()(x.double()), dtype)


def test_a_number_of_tokens_that_is_data() -> None:
    module = Layer(16, 16, lambda m, x: m.layer(x[x.sum(-1) > 0]))
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert declined(module, given()) == "its number of tokens is known at run time only"


def test_a_sparse_site_is_never_merged() -> None:
    class MLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = lora(8, 12), lora(8, 12), lora(12, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.silu(self.gate(x)) * self.up(x))

    model, inputs = Head(MLP(), MLP()), tokens(rows=9)
    config = SparseLoRAConfig(layer_sparsity={"body.1": 0.5})
    captured, outcome = order(model, *inputs, config=config)
    assert not outcome.rejections
    merged = {found.projection for found in captured.ctx.facts.product_orders if found.order != "F1B1"}
    assert merged and not any(name.startswith("body.1") for name in merged)
    _, dense = order(model, *inputs)
    assert sum(dense.stats.values()) == sum(outcome.stats.values()) + 3


# --- Through the backend ----------------------------------------------------------------------------------------------


class Model(nn.Module):
    """Three adapters of one tensor with too few tokens to merge, and a narrow layer that is merged."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.narrow = lora(64, 64, rank=4), lora(64, 64), lora(64, 64), lora(8, 8, rank=4)
        frozen(self).float()

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.q(x).sin() * self.k(x) + self.v(x)
        return self.narrow(mixed.unflatten(-1, (8, 8)).tanh()).square().mean()


@pytest.mark.slow
def test_inductor_compiles_fused_and_merged_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    real = executable.compile_with_inductor

    def watched(gm: Any, *args: Any) -> Any:
        run = real(gm, *args)
        names = targets(gm)
        return lambda *inputs: (ran.append(names), run(*inputs))[1]

    monkeypatch.setattr(executable, "compile_with_inductor", watched)
    model = Model()
    call = torch.compile(model, backend="sparselora", fullgraph=True, options={"preset": "exact"})
    for rows, length in ((2, 10), (3, 5)):
        x = any_tokens(normal(rows, length, 64).float().requires_grad_())
        loss, expected = call(x), model(x)
        assert_close_rms(loss, expected)
        found = gradients_of(loss, model, x)
        for name, gradient in gradients_of(expected, model, x).items():
            assert_close_rms(found[name], gradient, name=name)
    assert len(ran) == 2 and ran[0] is ran[1] and {"split_with_sizes", "merged_linear"} <= set(ran[0])


def test_plan_and_report_say_what_was_chosen() -> None:
    report = explain(Model(), normal(2, 10, 64).float(), config={"preset": "exact"})
    (graph,) = report.graphs
    assert [(each.projection, each.order) for each in graph.orders] == [
        ("q", "F1B1"), ("k", "F1B1"), ("v", "F1B1"), ("narrow", "F2B5")
    ]  # fmt: skip
    narrow = plan_data(SparsityPlan(()), graph.orders)["product_orders"][-1]
    assert narrow["tokens"] == 160 and narrow["break_even"].startswith("N > ") and "*N" in narrow["costs"]["F2B5"]
    (line,) = (
        line for line in str(report).splitlines() if line.startswith("merged into the weight in forward and back")
    )
    assert line.split()[-3:] == ["more", "than", narrow["break_even"].removeprefix("N > ")]
    change = next(each for each in graph.passes if each.record.name == PASS)
    assert change.flops_before - change.flops_after == narrow["saved_flops"] > 0
