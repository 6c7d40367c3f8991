"""DoRA's norm without the product of the adapter's factors, as PEFT and as people write it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from graphs import (
    aot_eager,
    assert_golden,
    capture,
    gradients_of,
    rejections,
    render,
    run_passes,
    run_rewritten,
    targets,
)
from models import normal
from sparse_compile.compiler.peft_support import make_dora_traceable
from sparse_compile.graph.flops import step_flops
from sparse_compile.passes.protocol import PassOutcome
from tolerances import assert_close_rms

PASS = "factor_dora_norm"
PASSES = ("canonicalize_linears", PASS)


class Layer(nn.Module):
    """A frozen weight with factors beside it, and a function that takes some norm of them."""

    def __init__(self, norm: Callable[[Layer], Tensor], dtype: torch.dtype = torch.float64):
        super().__init__()
        self.norm = norm
        self.w = nn.Parameter(normal(6, 4, seed=1).to(dtype), requires_grad=False)  # (out, in)
        self.stored = nn.Parameter(normal(4, 6, seed=1).to(dtype), requires_grad=False)  # (in, out)
        self.a = nn.Parameter(normal(2, 4, seed=2).to(dtype))
        self.b = nn.Parameter(normal(6, 2, seed=3).to(dtype))
        self.low = nn.Parameter(normal(4, 2, seed=2).to(dtype))  # A'
        self.bias = nn.Parameter(normal(6, seed=4).to(dtype))
        self.m = nn.Parameter(normal(6, seed=5).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        # The factors have a gradient of their own, which the norm must not add to.
        y = F.linear(x, self.w) + F.linear(F.linear(x, self.a), self.b)
        return (y * (self.m / self.norm(self))).pow(2).sum() + (self.low.sum() + self.bias.sum()).pow(2)


def merged(m: Layer) -> Tensor:
    return m.w + 2.0 * (m.b @ m.a).detach()


def through_identity(m: Layer, bias: Tensor | None = None) -> Tensor:
    return F.linear(F.linear(torch.eye(4, dtype=m.a.dtype), m.a), m.b, bias).T


SPELLINGS: dict[str, Callable[[Layer], Tensor]] = {
    "linalg.norm": lambda m: torch.linalg.norm(merged(m), dim=1),
    "vector_norm": lambda m: torch.linalg.vector_norm(merged(m), dim=-1),
    "vector_norm of order 2": lambda m: torch.linalg.vector_norm(merged(m), 2, dim=(1,)),
    "torch.norm": lambda m: torch.norm(merged(m), dim=1),
    "a method": lambda m: merged(m).norm(p=2, dim=1),
    "through an identity": lambda m: torch.linalg.norm(m.w + 0.5 * through_identity(m).detach(), dim=1),
    "no scale": lambda m: torch.linalg.norm(m.w + (m.b @ m.a).detach(), dim=1),
    "two scales": lambda m: torch.linalg.norm(m.w + 3.0 * (0.5 * (m.b @ m.a).detach()), dim=1),
    "weight last": lambda m: torch.linalg.norm((m.b @ m.a).detach() * 2.0 + m.w, dim=1),
    "detached factors": lambda m: torch.linalg.norm(m.w + m.b.detach() @ m.a.detach(), dim=1),
    "detached norm": lambda m: torch.linalg.norm(m.w + m.b @ m.a, dim=1).detach(),
    "detached weight": lambda m: torch.linalg.norm(m.w.detach() + (m.b @ m.a).detach(), dim=1),
    "weight stored transposed": lambda m: torch.linalg.norm(m.stored.T + (m.b @ m.a).detach(), dim=1),
    "A stored transposed": lambda m: torch.linalg.norm(m.w + F.linear(m.b, m.low).detach(), dim=1),
    "under no_grad": lambda m: under_no_grad(m),
    "two users": lambda m: (n := torch.linalg.norm(merged(m), dim=1)) + n.sqrt(),
}


def under_no_grad(m: Layer) -> Tensor:
    with torch.no_grad():
        return torch.linalg.norm(m.w + m.b @ m.a, dim=1)


def run(norm: Callable[[Layer], Tensor], dtype: torch.dtype = torch.float64) -> tuple[Layer, PassOutcome, list[str]]:
    layer = Layer(norm, dtype)
    captured = capture(layer, torch.ones(3, 4, dtype=dtype))
    return layer, run_passes(captured, *PASSES)[PASS], targets(captured.gm)


@pytest.mark.parametrize("name", SPELLINGS)
def test_forward_and_gradients(name: str) -> None:
    layer, outcome, called = run(SPELLINGS[name])
    assert outcome.changed and outcome.stats["norms"] == 1 and not outcome.rejections
    assert called.count("dora_norm") == 1 and not {"eye", "linalg_norm", "norm"} & set(called)
    x = normal(3, 4, seed=7).requires_grad_()
    ran = run_rewritten(layer, x, only=PASSES)
    expected = gradients_of(layer(x), layer, x)
    assert_close_rms(ran.value, layer(x))
    for key, gradient in gradients_of(ran.value, layer, x).items():
        assert_close_rms(gradient, expected[key], name=key)


NEAR_MISSES: dict[str, tuple[Callable[[Layer], Tensor], list[str]]] = {
    "a gradient": (lambda m: torch.linalg.norm(m.w + m.b @ m.a, dim=1), ["a gradient flows through the norm"]),
    "one detached reader of two": (
        lambda m: (n := torch.linalg.norm(m.w + m.b @ m.a, dim=1)).detach() + 0.1 * n,
        ["a gradient flows through the norm"],
    ),
    "order 1": (lambda m: torch.linalg.vector_norm(merged(m), 1, dim=1), ["it is not the L2 norm of each row"]),
    "columns": (lambda m: torch.linalg.norm(merged(m), dim=0).sum(), ["it is not the L2 norm of each row"]),
    "the whole matrix": (lambda m: torch.linalg.norm(merged(m)), ["it is not the L2 norm of each row"]),
    "dimension kept": (lambda m: merged(m).norm(dim=1, keepdim=True)[:, 0], ["it is not the L2 norm of each row"]),
    "a bias": (
        lambda m: torch.linalg.norm(m.w + through_identity(m, m.bias).detach(), dim=1),
        ["an adapter with a bias is more than the product of its factors"],
    ),
    "weights of a sum": (lambda m: torch.linalg.norm(torch.add(m.w, (m.b @ m.a).detach(), alpha=2), dim=1), []),
    "no product": (lambda m: torch.linalg.norm(m.w + m.w, dim=1), []),
    "another identity": (
        lambda m: torch.linalg.norm(m.w + F.linear(F.linear(torch.ones(4, 4).double(), m.a), m.b).T.detach(), dim=1),
        [],
    ),
    "a scale of tensors": (lambda m: torch.linalg.norm(m.w + (m.m[0] * (m.b @ m.a)).detach(), dim=1), []),
    "a broadcast": (lambda m: torch.linalg.norm(m.w + (m.b[:1] @ m.a).detach(), dim=1), []),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_declines(name: str) -> None:
    function, reasons = NEAR_MISSES[name]
    _, outcome, called = run(function)
    assert not outcome.changed and "dora_norm" not in called
    assert rejections(outcome) == reasons


def test_declines_a_trained_weight() -> None:
    layer = Layer(lambda m: torch.linalg.norm(m.w + m.b @ m.a, dim=1).detach())
    layer.w.requires_grad_(True)
    outcome = run_passes(capture(layer, torch.ones(3, 4, dtype=torch.float64)), *PASSES)[PASS]
    assert rejections(outcome) == ["its weight is trained"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtype_of_the_norm_is_kept(dtype: torch.dtype) -> None:
    layer = Layer(SPELLINGS["linalg.norm"], dtype)
    ran = run_rewritten(lambda: layer.norm(layer), only=PASSES)
    assert ran.value.dtype == dtype and ran.result.records[-1].changed
    assert_close_rms(ran.value, layer.double().norm(layer), dtype)


def test_norms_near_zero_keep_their_digits() -> None:
    """A row that the adapter takes away: by the expansion into squares no digit of its norm would be left in fp32."""
    layer = Layer(lambda m: torch.linalg.norm(m.w + (m.b @ m.a).detach(), dim=1), torch.float32)
    with torch.no_grad():
        layer.w.copy_(-(layer.b @ layer.a))
        layer.w[0] += 1e-4 * layer.w[1]
    ran = run_rewritten(lambda: layer.norm(layer), only=PASSES)
    w, a, b = (parameter.detach() for parameter in (layer.w, layer.a, layer.b))
    truth = (w.double() + b.double() @ a.double()).norm(dim=1)
    assert truth[0] < 1e-3 * w[0].norm()
    assert abs(ran.value[0] - truth[0]) < 1e-3 * truth[0]
    squares = w.square().sum(1) + 2 * ((w @ a.T) * b).sum(1) + ((b @ (a @ a.T)) * b).sum(1)
    assert abs(squares.clamp(min=0).sqrt()[0] - truth[0]) > 0.1 * truth[0], "the expansion would have done"


# --- PEFT -------------------------------------------------------------------------------------------------------------


def peft_layer(**options: object) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    base = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4, bias=False)).double()
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["0", "1"], use_dora=True, init_lora_weights=False, **options)
    model = get_peft_model(base, config).train()
    make_dora_traceable()
    return model


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_dropout": 0.5}], ids=str)
def test_peft(options: dict[str, object]) -> None:
    model, x = peft_layer(**options), normal(2, 3, 4).requires_grad_()
    torch.manual_seed(0)
    ran = run_rewritten(lambda x: model(x).square().sum(), x, only=PASSES, compiler=aot_eager)
    assert ran.result.records[-1].stats["norms"] == 2
    torch.manual_seed(0)
    eager = model(x).square().sum()
    expected = gradients_of(eager, model, x)
    assert_close_rms(ran.value, eager)
    for name, gradient in gradients_of(ran.value, model, x).items():
        assert gradient.any()
        assert_close_rms(gradient, expected[name], name=name)


def test_peft_on_conv1d() -> None:
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    config = LoraConfig(r=2, target_modules=["0"], use_dora=True, fan_in_fan_out=True, init_lora_weights=False)
    model = get_peft_model(nn.Sequential(Conv1D(6, 4)).double(), config)
    make_dora_traceable()
    x = normal(2, 3, 4)
    ran = run_rewritten(model, x, only=PASSES)
    assert ran.result.records[-1].stats["norms"] == 1
    assert_close_rms(ran.value, model(x))


def test_peft_in_half_precision_with_fp32_adapters() -> None:
    """The op reads the weight as it is stored: no cast of all of it is left in the graph."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["0"], use_dora=True, init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 6)).bfloat16(), config)
    make_dora_traceable()
    x = normal(2, 3, 4).bfloat16()
    captured = capture(model, x)
    run_passes(captured, *PASSES)
    (norm,) = (node for node in captured.gm.graph.nodes if "dora_norm" in str(node.target))
    assert norm.args[0].op == "placeholder" and norm.args[0].meta["example_value"].dtype == torch.bfloat16
    assert not any(node.target == "to" and node.args[0] is norm.args[0] for node in captured.gm.graph.nodes)


def test_golden_and_idempotent() -> None:
    x = normal(2, 3, 4)
    captured = capture(peft_layer(), x)
    before = step_flops(captured.gm.graph).total
    outcome = run_passes(captured, *PASSES)[PASS]
    assert outcome.stats["norms"] == 2
    assert_golden(PASS, render(captured))
    # An identity of in x in times A, then B, against one product of the factors: for both layers, forward alone.
    saved = 2.0 * 2 * (4 * 4 + 6 * 6)
    assert float(before - step_flops(captured.gm.graph).total) == saved
    assert not run_passes(captured, PASS)[PASS].changed


def test_dynamic_tokens() -> None:
    x = normal(5, 4)
    captured = capture(peft_layer(), x, dynamic=((x, 0),))
    assert run_passes(captured, *PASSES)[PASS].stats["norms"] == 2


def test_unrelated_graph() -> None:
    captured = capture(lambda x: torch.linalg.norm(x + x @ x, dim=1), normal(4, 4))
    outcome = run_passes(captured, *PASSES)[PASS]
    assert not outcome.changed and not outcome.rejections
