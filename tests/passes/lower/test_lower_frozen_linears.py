"""Products with frozen weights go to the faster library; what they compute stays as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from graphs import (
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
    targets,
    tokens,
)
from models import normal
from sparse_compile.compiler.pipeline import PASSES
from sparse_compile.compiler.runner import run_pipeline
from sparse_compile.kernels import cpu_gemm
from sparse_compile.options.config import SparseLoRAConfig
from tolerances import assert_close_rms

PASS = "lower_frozen_linears"


@pytest.fixture(autouse=True)
def faster_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take this processor for one on which oneDNN is the faster, whatever it is."""
    if not cpu_gemm.has_onednn_linear():
        pytest.skip("this build of PyTorch has no oneDNN")
    monkeypatch.setattr(cpu_gemm, "_processor_declines", lambda: None)


class Layers(nn.Module):
    """A wide layer with an adapter and a bias, a narrow one, and one stored transposed."""

    def __init__(self, function: Callable[[Layers, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.up, self.down = lora(8, 128, bias=True), lora(128, 16)
        self.stored = nn.Parameter(torch.empty(16, 128))
        self.function = function or (lambda m, x: m.down(F.silu(m.up(x))) @ m.stored)
        frozen(self).float()

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x).sin().sum()


def x(*shape: int) -> Tensor:
    return normal(*shape or (2, 3, 8)).float().requires_grad_()


def test_the_simple_case() -> None:
    captured = capture(Layers(), x())
    outcome = run_passes(captured, "canonicalize_linears", PASS)[PASS]
    # Two are wide: `up` and the one that is stored transposed.
    assert outcome.stats == {"cpu_onednn": 2}
    assert rejections(outcome) == ["cpu_onednn: a result of fewer than 128 columns is faster by MKL"]
    assert_golden(PASS, render(captured))
    before = render(captured)
    assert not run_passes(captured, PASS)[PASS].changed and render(captured) == before


@pytest.mark.parametrize("rows", [(2, 3), (1,), (0,)])
def test_loss_and_gradients_are_those_of_eager(rows: tuple[int, ...]) -> None:
    module, inputs = Layers(), x(*rows, 8)
    ran = run_rewritten(module, inputs, only=("canonicalize_linears", PASS), compiler=aot_eager)
    assert ran.result.exact is not None and "frozen_linear" in targets(ran.result.exact)
    expected = module(inputs)
    assert_close_rms(ran.value, expected, name="value")
    found, wanted = (gradients_of(value, module, inputs) for value in (ran.value, expected))
    for name in wanted:
        assert_close_rms(found[name], wanted[name], name=name)


def test_a_symbolic_number_of_tokens() -> None:
    inputs = x()
    captured = capture(Layers(), inputs, dynamic=((inputs, 0),))
    assert run_passes(captured, "canonicalize_linears", PASS)[PASS].stats == {"cpu_onednn": 2}


def test_several_readers_and_repeated_layers() -> None:
    module = Layers(lambda m, x: torch.cat([m.up(x), m.up(x + 1), m.up(x) * 2], -1))
    captured = capture(module, x())
    assert run_passes(captured, "canonicalize_linears", PASS)[PASS].stats == {"cpu_onednn": 3}


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: F.linear(x, m.up.base_layer.weight.bfloat16().float()),
        lambda m, x: F.linear(x, m.up.base_layer.weight * 2),
        lambda m, x: F.linear(x, m.up.base_layer.weight[:64]),
        lambda m, x: F.linear(x.double(), m.up.base_layer.weight.double()),
    ],
    ids=["cast", "scaled", "sliced", "another dtype"],
)
def test_a_weight_that_is_not_as_stored_stays(function: Callable[[Layers, Tensor], Tensor]) -> None:
    captured = capture(Layers(function), x())
    outcome = run_passes(captured, "canonicalize_linears", PASS)[PASS]
    assert not outcome.changed and rejections(outcome) == []


def test_a_trained_weight_stays() -> None:
    module = Layers(lambda m, x: F.linear(x, m.up.base_layer.weight))
    module.up.base_layer.weight.requires_grad_()
    captured = capture(module, x())
    outcome = run_passes(captured, "canonicalize_linears", PASS)[PASS]
    assert not outcome.changed and outcome.rejections == ()


def test_other_dtypes_are_declined_with_the_reason() -> None:
    captured = capture(Layers().double(), x().double())
    outcome = run_passes(captured, "canonicalize_linears", PASS)[PASS]
    assert not outcome.changed
    assert all("other dtypes than fp32" in reason for reason in rejections(outcome)) and outcome.rejections


def test_autocast_is_declined_with_the_reason() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        captured = capture(Layers(), x())
        outcome = run_passes(captured, "canonicalize_linears", PASS)[PASS]
    assert not outcome.changed
    assert "cpu_onednn: autocast casts its operands" in rejections(outcome)


def test_another_processor_is_declined_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_gemm, "_processor_declines", lambda: "not on this one")
    captured = capture(Layers(), x())
    outcome = run_passes(captured, "canonicalize_linears", PASS)[PASS]
    assert not outcome.changed and "cpu_onednn: not on this one" in rejections(outcome)


class MLP(nn.Module):
    """A feed-forward block wide enough for both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = lora(128, 160), lora(160, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))


def test_the_dense_products_of_a_sparse_site_are_lowered_too() -> None:
    config = SparseLoRAConfig(layer_sparsity={"body.0": 0.5}, disable=("select_loss_rows",))
    captured = capture(Head(MLP(), MLP(), hidden=128).float(), *tokens(), config=config)
    result = run_pipeline(captured.gm, captured.ctx)
    assert result.sparse is not None and "gathered_linear" in targets(result.sparse)
    # Two blocks of two products; the sparse one has its dense products still, for output tokens.
    assert targets(result.sparse).count("frozen_linear") == 4


def test_where_it_fails_sparsity_goes_on() -> None:
    captured = capture(
        Head(MLP(), hidden=128).float(), *tokens(), config=SparseLoRAConfig(layer_sparsity={"body.0": 0.5})
    )

    def fails(*_: object) -> None:
        raise RuntimeError("no such library")

    order = [stand_in_pass(fails, each) if each.name == PASS else each for each in PASSES]
    with pytest.warns(UserWarning, match=f"{PASS} failed, the pass is left out"):
        result = run_pipeline(captured.gm, captured.ctx, order=order)
    assert result.sparse is not None and "gathered_linear" in targets(result.sparse)
