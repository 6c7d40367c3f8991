"""Fused products read weights in 4 bits as they are stored: the op, its formula, and models whose sites become it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

pytest.importorskip("bitsandbytes")

from bitsandbytes.functional import quantize_4bit

from four_bit import pair
from graphs import ANALYSES, capture, rejections, run_passes
from models import ALL_TARGETS, batch, with_lora
from oracle import assert_same_step, oracle_step, sparse_step, told
from sparse_compile.kernels.dequantize_4bit import reference
from sparse_compile.kernels.dequantize_4bit.packed import PackedFormat, PackedWeight, packed_weights, parse_format
from sparse_compile.kernels.fused_linear import fused_linear
from sparse_compile.kernels.providers import REFERENCE, Choice, OpCall
from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.passes.lower import fuse_products

# --- What is stored ---------------------------------------------------------------------------------------------------


def packed(
    rows: int, width: int, *, nested: bool = False, quant_type: str = "nf4", blocksize: int = 64, seed: int = 0
) -> PackedWeight:
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    data, state = quantize_4bit(weight, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type)
    own = (state.state2.absmax, (state.absmax, state.state2.code, state.offset)) if nested else (state.absmax, ())
    return PackedWeight(data, *own, PackedFormat(quant_type, blocksize, rows, width, nested))


def dense(weight: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """As the library dequantises the whole weight."""
    form, nested = weight.format, weight.nested or (None, None, None)
    shape = (form.rows, form.width)
    return reference.dequantize_4bit(weight.data, weight.absmax, *nested, shape, form.blocksize, form.quant_type, dtype)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64, 1024])
def test_chosen_channels_are_those_that_the_library_dequantises(blocksize: int, quant_type: str, nested: bool) -> None:
    weight = packed(24, max(blocksize, 128), nested=nested, quant_type=quant_type, blocksize=blocksize)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        whole = dense(weight, dtype)
        for dim in (0, 1):
            chosen = torch.tensor([0, 3, 22])
            assert torch.equal(weight.channels(chosen, dim, dtype), whole.index_select(dim, chosen))
            turned = PackedWeight(weight.data, weight.absmax, weight.nested, weight.format.T)
            assert torch.equal(turned.channels(chosen, dim, dtype), whole.T.index_select(dim, chosen))


def test_a_format_is_its_text() -> None:
    form = PackedFormat("nf4", 64, 14336, 4096, nested=True, transposed=True)
    assert form.text == "nf4 64 14336x4096 nested transposed" and parse_format(form.text) == form
    assert form == form.T.T and form.shape == (4096, 14336) and form.whole_rows


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("nf4", "not the format of a weight in 4 bits"),
        ("nf4 64 8by8", "not the format"),
        ("nf4 64 8x8 upside_down", "upside_down"),
        ("int4 64 8x8", "its numbers are int4"),
        ("nf4 48 8x8", "its blocks have 48 elements, not a power of two from 32 to 4096"),
        ("fp4 64 8x7", "its rows have 7 elements"),
    ],
)
def test_texts_that_are_no_format(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_format(text)


def test_scales_must_fit() -> None:
    weight = packed(8, 64)
    for scales, reason in (([], "has 1 tensors of scales, not 0"), ([weight.absmax] * 3, "2 tensors of scales belong")):
        with pytest.raises(ValueError, match=reason):
            packed_weights([weight.data], scales, weight.format.text)


# --- The op -----------------------------------------------------------------------------------------------------------


def call(dim: int, dtype: torch.dtype, formula: str = "p0*sigmoid(p0 + t0)*p1 + p2") -> tuple[Any, ...]:
    """Arguments of a product with two weights in 4 bits, and a dense one between them."""
    weights = [packed(12, 64, nested=True), packed(12, 64, quant_type="fp4", blocksize=32, seed=1)]
    channels = torch.tensor([1, 4, 9, 11])

    def drawn(*shape: int, seed: int, trained: bool = True) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_(trained)

    x, factor = (drawn(5, 64, seed=2), drawn(4, 2, seed=4)) if dim == 0 else (drawn(5, 4, seed=2), drawn(12, 2, seed=4))
    stored = [weights[0].data, drawn(12, 64, seed=3, trained=False), weights[1].data]
    scales = [scale for each in weights for scale in (each.absmax, *each.nested)]
    formats = f"{weights[0].format.text};;{weights[1].format.text}"
    thin = drawn(5, 2, seed=5)
    places = ([channels] * 3, [0] * 3, [dim] * 3)
    return [x], stored, *places, [thin], [factor], [], formula, dtype, scales, formats, REFERENCE


@pytest.mark.parametrize("dim", [0, 1])
def test_op_contract(dim: int) -> None:
    torch.library.opcheck(fused_linear, call(dim, torch.float32))


@pytest.mark.parametrize("dim", [0, 1])
def test_gradients(dim: int) -> None:
    (x,), *frozen, (thin,), (factor,), vectors, formula, dtype, scales, formats, provider = call(dim, torch.float64)

    def function(x: Tensor, thin: Tensor, factor: Tensor) -> Tensor:
        return fused_linear([x], *frozen, [thin], [factor], vectors, formula, dtype, scales, formats, provider)[0]

    assert torch.autograd.gradcheck(function, (x, thin, factor))


# --- The model --------------------------------------------------------------------------------------------------------


class _Table:
    def choose(self, call: OpCall, kernels: str) -> Choice:
        return Choice("triton", ())


@pytest.fixture
def with_a_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels run on GPUs: what the rewritten graph computes is tested by the op's reference body."""
    monkeypatch.setattr(fuse_products, "FUSED_LINEAR", _Table())


def compiled(model: nn.Module, **options: Any) -> Any:
    options = {"layer_sparsity": {"mlp": 0.6, "self_attn": 0.5}, "strict": True, "preset": "none", **options}
    return torch.compile(model, backend="sparselora", dynamic=False, options=options)


def calls(graph: fx.GraphModule, op: str) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if node.target is getattr(torch.ops.sparselora, op).default]


@pytest.mark.slow
@pytest.mark.usefixtures("with_a_provider")
def test_a_qlora_model_trains_as_the_oracle_says(aot_eager_inductor: Any) -> None:
    model, twin = (with_lora(each, ALL_TARGETS) for each in pair(layers=1, nested=True))
    inputs = batch(97, padding="right")
    shapes: set[tuple[int, ...]] = set()

    def pack(tensor: Tensor) -> Tensor:
        shapes.add(tuple(sorted(tensor.shape)))
        return tensor

    with told() as messages, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step, kept = sparse_step(model, compiled(model), inputs)
    assert messages == [] and len(kept) == 2
    assert_same_step(step, oracle_step(twin, kept, inputs), torch.float32)
    assert shapes and not shapes & {(64, 64), (32, 64), (64, 128)}
    # What is left to be dequantised is what output tokens are multiplied with: whole weights.
    (graph,) = aot_eager_inductor.graphs
    assert all(len(node.args) < 10 or node.args[9] is None for node in calls(graph, "dequantize_4bit"))
    assert calls(graph, "fused_linear")


def test_declined() -> None:
    """Where the kernels do not run, and a format that bitsandbytes' kernels read in two ways."""
    config = SparseLoRAConfig(layer_sparsity={"mlp": 0.5}, preset="none", kernels="triton")
    captured = capture(with_lora(pair(layers=1, ffn=96)[0], ALL_TARGETS), **batch(97), config=config)
    run_passes(captured, "expose_4bit_weights", *ANALYSES, "insert_predictors", "sparsify_ffn")
    outcome = run_passes(captured, "fuse_products")["fuse_products"]
    assert not outcome.changed and rejections(outcome) == ["triton: runs on NVIDIA GPUs, not on cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fuse_products, "FUSED_LINEAR", _Table())
        outcome = run_passes(captured, "fuse_products")["fuse_products"]
    # Gate and up, whose rows are whole blocks, are fused all the same.
    assert outcome.stats["fused"] == 1
    (reason,) = set(rejections(outcome))
    assert reason.startswith("its weight in 4 bits is dequantised before the product: bitsandbytes counts blocks anew")
