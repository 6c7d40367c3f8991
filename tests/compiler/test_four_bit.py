"""QLoRA: frozen layers stored in 4 bits by bitsandbytes train sparsely as their dequantised weights would."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("bitsandbytes")

import bitsandbytes

from four_bit import pair, quantized
from graphs import capture, rejections, run_passes
from models import ALL_TARGETS, batch, with_lora
from oracle import SPARSITY, assert_differs, assert_same_step, oracle_step, sparse_step, told, train_step
from sparse_compile import explain
from sparse_compile.compiler.peft_support import make_dora_traceable
from sparse_compile.kernels.dequantize_4bit import dequantize_4bit, reference
from sweeps import slow
from tolerances import Tolerance

PASS = "expose_4bit_weights"


def compiled(model: nn.Module, **options: Any) -> Any:
    options = {"layer_sparsity": SPARSITY, "strict": True, "preset": "none", **options}
    return torch.compile(model, backend="sparselora", dynamic=False, options=options)


# --- The op -----------------------------------------------------------------------------------------------------------


def packed(rows: int, width: int, nested: bool, quant_type: str, blocksize: int = 64) -> tuple[Any, ...]:
    """Return the operands of the op but the dtype, for a random weight."""
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    data, state = bitsandbytes.functional.quantize_4bit(
        weight, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type
    )
    scales = (
        (state.state2.absmax, state.absmax, state.state2.code, state.offset) if nested else (state.absmax, *[None] * 3)
    )
    return data, *scales, [rows, width], blocksize, quant_type


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "width", "blocksize"), [(24, 128, 64), (300, 128, 64), (24, 96, 64), (6, 50, 64), (16, 256, 128)]
)
@pytest.mark.parametrize(("nested", "quant_type"), [(False, "nf4"), (True, "nf4"), (False, "fp4"), (True, "fp4")])
def test_chosen_channels_are_those_of_the_whole_weight(
    nested: bool, quant_type: str, rows: int, width: int, blocksize: int, dtype: torch.dtype
) -> None:
    """Rows that are whole blocks, that start within a block, and more than 256 blocks, which share a scale's scale."""
    operands = (*packed(rows, width, nested, quant_type, blocksize), dtype)
    whole = reference.dequantize_4bit(*operands)
    assert torch.equal(dequantize_4bit(*operands), whole) and whole.shape == (rows, width)
    for dim in (0, 1):
        channels = torch.randperm(whole.shape[dim])[: whole.shape[dim] // 2].sort().values
        assert torch.equal(dequantize_4bit(*operands, channels, dim), whole.index_select(dim, channels))
    single = torch.tensor([width - 1])
    assert torch.equal(dequantize_4bit(*operands, single, 1), whole[:, -1:])


@pytest.mark.parametrize("dim", [None, 0, 1])
def test_op_contract(dim: int | None) -> None:
    channels = () if dim is None else (torch.tensor([0, 3, 5]), dim)
    torch.library.opcheck(dequantize_4bit, (*packed(8, 128, True, "nf4"), torch.float32, *channels))


def test_storage_of_another_dtype() -> None:
    data, *rest = packed(8, 128, False, "nf4")
    stored = data.view(-1).view(torch.bfloat16).view(-1, 1)
    for channels in ((), (torch.tensor([1, 6]), 0), (torch.tensor([1, 6]), 1)):
        whole = dequantize_4bit(data, *rest, torch.float32, *channels)
        assert torch.equal(dequantize_4bit(stored, *rest, torch.float32, *channels), whole)


# --- The model --------------------------------------------------------------------------------------------------------

FORMS: dict[str, dict[str, Any]] = {
    "nf4": {"dtype": torch.float32},
    "nf4, nested": {"nested": True, "dtype": torch.float32},
    "fp4": {"quant_type": "fp4"},
    "fp4, nested": {"quant_type": "fp4", "nested": True},
    "rows that are not whole blocks": {"ffn": 96},
    "blocks of 128, stored as bf16": {"blocksize": 128, "storage": torch.bfloat16},
}


@pytest.mark.parametrize(
    ("form", "preset"),
    [("nf4", "none"), *(slow(form, "none") for form in FORMS if form != "nf4"), slow("nf4, nested", "exact")],
)
def test_a_qlora_model_trains_as_the_oracle_says(form: str, preset: str, aot_eager_inductor: Any) -> None:
    model, twin = (with_lora(each, ALL_TARGETS) for each in pair(**FORMS[form]))
    inputs = batch(97, padding="right")
    with told() as messages:
        step, kept = sparse_step(model, compiled(model, preset=preset), inputs)
    assert messages == [] and aot_eager_inductor.sparse == [True]
    # Of the last block only rows of the loss are computed by the exact passes: its feed-forward site is gone.
    assert len(kept) == len(SPARSITY) - (preset == "exact")
    assert_same_step(step, oracle_step(twin, kept, inputs), torch.float32)
    assert_differs(step, train_step(model, model, inputs))


@pytest.mark.slow
@pytest.mark.parametrize(("nested", "dropout"), [(False, 0.0), (True, 0.1)])
def test_a_dora_adapter_trains_as_the_oracle_says(nested: bool, dropout: float, aot_eager_inductor: Any) -> None:
    """PEFT dequantises the weight for its norm, and with dropout multiplies with it."""
    pytest.importorskip("peft")
    make_dora_traceable()  # a module before may have looked up the backend without PEFT
    pairs = pair(layers=1, nested=nested, dtype=torch.float32)
    # Before the out-projection of a sparse feed-forward block dropout draws otherwise than in the eager model.
    targets = ALL_TARGETS[:-1] if dropout else ALL_TARGETS
    model, twin = (with_lora(each, targets, dora=True, dropout=dropout) for each in pairs)
    inputs, sites = batch(97), {"layers.0.mlp": 0.6, "layers.0.self_attn": 0.5}
    with told() as messages:
        step, kept = sparse_step(model, compiled(model, layer_sparsity=sites), inputs, seed=3)
    assert messages == [] and aot_eager_inductor.sparse == [True] and len(kept) == len(sites)
    (graph,) = aot_eager_inductor.graphs
    assert "ops.bitsandbytes" not in str(graph.graph), "each weight is dequantised once"
    assert_same_step(step, oracle_step(twin, kept, inputs, seed=3), torch.float32)


def test_only_chosen_rows_and_columns_are_dequantised_for_context_tokens(aot_eager_inductor: Any) -> None:
    model = with_lora(pair(layers=1)[0], ALL_TARGETS)
    train_step(model, compiled(model, layer_sparsity={"mlp": 0.9}), batch(97))
    (graph,) = aot_eager_inductor.graphs
    parts = [node for node in graph.graph.nodes if node.target is torch.ops.sparselora.dequantize_4bit.default]
    # Seven layers for output tokens; of gate, up and down what is kept for context tokens.
    assert [node.args[10] for node in parts if len(node.args) > 9] == [0, 0, 1]
    assert len(parts) == 7 + 3


def checkpointing(model: nn.Module) -> None:
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    model.disable_input_require_grads()  # type: ignore[operator]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
def test_no_dense_weight_is_saved_for_the_backward(checkpointed: bool, aot_eager_inductor: Any) -> None:
    """The backward dequantises again, as that of bitsandbytes does."""
    model, twin = (with_lora(each, ALL_TARGETS) for each in pair(layers=2, nested=True))
    if checkpointed:
        checkpointing(model)
    inputs = batch(97, rows=1, length=8)
    call = compiled(model, preset="exact")
    shapes: set[tuple[int, ...]] = set()

    def pack(tensor: Tensor) -> Tensor:
        shapes.add(tuple(sorted(tensor.shape)))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step, kept = sparse_step(model, call, inputs)
    assert shapes and not shapes & {(64, 64), (32, 64), (64, 128)}
    assert_same_step(step, oracle_step(twin, kept, inputs), torch.float32)


@pytest.mark.slow
def test_a_bf16_layer_in_an_fp32_model(aot_eager_inductor: Any) -> None:
    """As `prepare_model_for_kbit_training` leaves it: fp32 norms, so each layer casts its input and its result."""
    model, twin = (with_lora(each, ALL_TARGETS) for each in pair(dtype=torch.bfloat16))
    inputs = batch(97)
    with told() as messages:
        step, kept = sparse_step(model, compiled(model), inputs)
    assert messages == [] and len(kept) == len(SPARSITY)
    bf16_products = Tolerance(max=0.2, rms=0.05, why="The twin computes the frozen products in fp32.")
    assert_same_step(step, oracle_step(twin, kept, inputs), torch.float32, tolerance=bf16_products)


def test_nothing_asked_for_compiles_what_was_captured(aot_eager_inductor: Any) -> None:
    model = with_lora(pair(layers=1)[0], ALL_TARGETS)
    train_step(model, compiled(model, layer_sparsity={}), batch(97))
    (graph,) = aot_eager_inductor.graphs
    assert not any("sparselora" in str(node.target) for node in graph.graph.nodes)


def test_factors_are_those_of_what_the_layers_hold(aot_eager_inductor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Tensor] = {}
    from sparse_compile.predictor.store import FactorStore

    get = FactorStore.get
    monkeypatch.setattr(FactorStore, "get", lambda self, name, w: (seen.__setitem__(name, w), get(self, name, w))[1])
    model, twin = (with_lora(each, ALL_TARGETS) for each in pair(layers=1, nested=True))
    train_step(model, compiled(model, layer_sparsity={"mlp": 0.5}), batch(97))
    assert len(seen) == 2
    for name, weight in seen.items():
        assert torch.equal(weight, twin.get_submodule(name).base_layer.weight)  # type: ignore[union-attr]


# --- Declined ---------------------------------------------------------------------------------------------------------


def test_autocast_to_another_dtype_is_declined_in_words_to_act_on(aot_eager_inductor: Any) -> None:
    model = with_lora(pair(layers=1, dtype=torch.float32)[0], ALL_TARGETS)
    call = torch.compile(model, backend="sparselora", options={"layer_sparsity": {"mlp": 0.5}})
    with told() as messages, torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            train_step(model, call, batch(97))
    assert len(messages) == 2, "that no site has the name asked for, and why"
    assert "set bnb_4bit_compute_dtype=torch.bfloat16" in messages[-1]
    assert not any(aot_eager_inductor.sparse)


@pytest.mark.slow
def test_autocast_to_the_dtype_of_the_layers_is_sparse(aot_eager_inductor: Any) -> None:
    model, twin = (with_lora(each, ALL_TARGETS) for each in pair(dtype=torch.bfloat16))
    inputs = batch(97)
    with torch.autocast("cpu", torch.bfloat16):
        step, kept = sparse_step(model, compiled(model), inputs)
        expected = oracle_step(twin, kept, inputs)
    assert len(kept) == len(SPARSITY)
    bf16 = Tolerance(max=0.3, rms=0.06, why="Roundings to bf16 at other places than in eager.")
    assert_same_step(step, expected, torch.float32, tolerance=bf16)


def layer(**how: Any) -> Any:
    module = nn.Sequential()
    module.add_module("q_proj", nn.Linear(64, 32))
    return quantized(module, **how).q_proj


class Product(nn.Module):
    """A product with a layer's weight, spelt in a way of its own."""

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.layer = layer(dtype=torch.float32).requires_grad_(False)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer, x)


def gemm(layer: Any, x: Tensor, data: Tensor | None = None, absmax: Tensor | None = None) -> Tensor:
    state = layer.weight.quant_state
    data, absmax = data if data is not None else layer.weight, absmax if absmax is not None else state.absmax
    return torch.ops.bitsandbytes.gemm_4bit(x, data, [32, 64], absmax, 64, "nf4")


NEAR_MISSES: dict[str, tuple[Callable[..., Tensor], str]] = {
    "scales that are computed": (
        lambda layer, x: gemm(layer, x, absmax=layer.weight.quant_state.absmax * 2),
        "computed in the graph, not a parameter",
    ),
    "data that is no parameter": (
        lambda layer, x: gemm(layer, x[:, :64], data=layer.data),
        "not a frozen parameter",
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name: str) -> None:
    function, reason = NEAR_MISSES[name]
    model = Product(function)
    model.layer.data = model.layer.weight.data.clone()
    captured = capture(model, torch.randn(2, 64))
    outcome = run_passes(captured, PASS)[PASS]
    assert not outcome.changed
    (found,) = rejections(outcome)
    assert reason in found


def again(scale: float, dtype: torch.dtype = torch.float32) -> Callable[..., Tensor]:
    def function(layer: Any, x: Tensor) -> Tensor:
        state, y = layer.weight.quant_state, layer(x)
        absmax = state.absmax if scale == 1 else state.absmax * scale
        dense = torch.ops.bitsandbytes.dequantize_4bit(layer.weight.data, absmax, 64, "nf4", [32, 64], dtype)
        return y + dense.sum().float()

    return function


@pytest.mark.parametrize(
    ("function", "shared"), [(again(1), True), (again(2), False), (again(1, torch.bfloat16), False)]
)
def test_a_second_dequantisation_is_the_first_where_it_is_of_the_same_weight(
    function: Callable[..., Tensor], shared: bool
) -> None:
    captured = capture(Product(function), torch.randn(2, 64))
    run_passes(captured, PASS)
    assert ("bitsandbytes.dequantize_4bit" not in str(captured.gm.graph)) == shared


@pytest.mark.parametrize("gradient", [False, True])
def test_both_forms_of_the_product_become_linear(gradient: bool) -> None:
    """bitsandbytes has an autograd function of its own where a gradient reaches x."""
    captured = capture(Product(lambda layer, x: layer(x).clone() + 1), torch.randn(2, 64, requires_grad=gradient))
    text = str(captured.gm.graph)
    assert ("autograd_function_apply" in text) == gradient
    run_passes(captured, PASS, "canonicalize_linears", "find_projections")
    assert not re.search("autograd_function_apply|gemm_4bit|clone", str(captured.gm.graph))
    (projection,) = captured.ctx.facts.projections.values()
    assert (projection.in_features, projection.out_features) == (64, 32)
    assert projection.bias is not None
    assert not run_passes(captured, PASS)[PASS].changed


def test_a_pruned_4_bit_model_is_told_that_its_zeros_cannot_be_kept() -> None:
    model = with_lora(pair(layers=1)[0], ("q_proj",))
    report = explain(model, **batch(97), config={"preset": "none", "preserve_weight_mask": "auto"})
    assert any("packed in 4 or 8 bits" in each.reason for each in report.rejections)


def test_a_merged_order_is_declined() -> None:
    report = explain(with_lora(pair(layers=1)[0], ALL_TARGETS), **batch(97), config={"preset": "exact"})
    reasons = {each.reason for each in report.rejections if each.rule == "order_adapter_products"}
    assert reasons == {"its weight is stored in 4 bits, and a merged one would be a dense copy of it"}


# --- Compiled for real ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_through_inductor() -> None:
    model, twin = (with_lora(each, ALL_TARGETS) for each in pair(layers=1, nested=True))
    inputs = batch(97)
    sparsity = {"layers.0.mlp": 0.5, "layers.0.self_attn": 0.5}
    step, kept = sparse_step(model, compiled(model, layer_sparsity=sparsity), inputs)
    assert len(kept) == 2
    assert_same_step(step, oracle_step(twin, kept, inputs), torch.float32)
