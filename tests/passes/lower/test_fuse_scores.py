"""The score of a sparse feed-forward block becomes one op that computes what was composed."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F  # noqa: N812

from graphs import (
    ANALYSES,
    Captured,
    Head,
    assert_golden,
    capture,
    frozen,
    lora,
    rejections,
    render,
    run_passes,
    run_rewritten,
    targets,
    tokens,
)
from sparse_compile.kernels.providers import Choice, OpCall
from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.passes.context import PassContext
from sparse_compile.passes.lower import fuse_scores
from sparse_compile.passes.protocol import PassOutcome
from tolerances import assert_close_rms

PASS = "fuse_scores"
BEFORE = (*ANALYSES, "insert_predictors", "sparsify_ffn", "sparsify_attention")
Function = Callable[[Any, Tensor], Tensor]


class MLP(nn.Module):
    """Projections and a function of them; the out-projection's input is the intermediate."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.gate, self.up, self.down = lora(8, 12, bias=True), lora(8, 12, bias=True), lora(12, 8, bias=True)
        self.both = lora(8, 24, bias=True)
        self.scale = nn.Parameter(torch.empty(12))
        self.broad = nn.Parameter(torch.empty(1, 1, 12))
        frozen(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def silu_gate(m: Any, x: Tensor) -> Tensor:
    return m.down(F.silu(m.gate(x)) * m.up(x))


def fused_gate_up(m: Any, x: Tensor) -> Tensor:
    gate, up = m.both(x).chunk(2, dim=-1)
    return m.down(F.silu(gate) * up)


FUNCTIONS: dict[str, Function] = {
    "silu gate": silu_gate,
    "erf gelu": lambda m, x: m.down(F.gelu(m.gate(x)) * m.up(x)),
    "relu squared": lambda m, x: m.down(F.relu(m.up(x)).square()),
    "in place": lambda m, x: m.down(F.relu(m.up(x), inplace=True)),
    "dropout": lambda m, x: m.down(F.dropout(F.silu(m.up(x)), 0.5)),
    "clamped": lambda m, x: m.down(m.up(x).clamp(min=-0.5, max=0.7) / 2 - 0.1),
    "a scale a channel": lambda m, x: m.down(F.silu(m.gate(x)) * m.scale * m.up(x)),
    "a scale of three dimensions": lambda m, x: m.down(F.gelu(m.up(x)) * m.broad),
    "a number from outside": lambda m, x: m.down(F.gelu(m.up(x)) * m.scale.sum()),
    "one fused layer": fused_gate_up,
}


@pytest.fixture
def with_a_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels compute no fp64 and run on GPUs: what they compute is tested by the reference body."""

    class Table:
        def choose(self, call: OpCall, kernels: str) -> Choice:
            return Choice("triton", ())

    monkeypatch.setattr(fuse_scores, "PREDICTED_SCORES", Table())


def config(**options: Any) -> SparseLoRAConfig:
    return SparseLoRAConfig(**{"layer_sparsity": {"body.0": 0.5}, "kernels": "triton", **options})


def fused(model: nn.Module, dynamic: int | None = None, **options: Any) -> tuple[Captured, PassOutcome]:
    ids, labels = tokens(rows=3)
    sizes = () if dynamic is None else ((ids, dynamic), (labels, dynamic))
    captured = capture(model, ids, labels, config=config(**options), dynamic=sizes)
    return captured, run_passes(captured, *BEFORE, PASS)[PASS]


def ranked(model: nn.Module, **options: Any) -> tuple[list[Tensor], list[str]]:
    """Return the scores that channels are chosen by, and what the rewritten graph calls."""
    scores: list[Tensor] = []
    called: list[str] = []

    class Recorder(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            if node.target is torch.ops.sparselora.top_channels.default:
                scores.append(self.fetch_args_kwargs_from_env(node)[0][0])
            return super().run_node(node)

    def compiler(gm: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        called.extend(targets(gm))
        return Recorder(gm).run

    run_rewritten(model, *tokens(rows=3), config=config(**options), only=(*BEFORE, PASS), compiler=compiler)
    return scores, called


@pytest.mark.usefixtures("with_a_provider")
@pytest.mark.parametrize(
    ("name", "predictor_tokens"), [*((name, 16) for name in FUNCTIONS), ("silu gate", "mean"), ("silu gate", "all")]
)
def test_scores_are_those_composed(name: str, predictor_tokens: object) -> None:
    model = Head(MLP(FUNCTIONS[name]))
    (score,), called = ranked(model, predictor_tokens=predictor_tokens)
    (composed,), calls = ranked(model, predictor_tokens=predictor_tokens, kernels="measured")
    assert called.count("predicted_scores") == 1 and "low_rank_product" not in called
    assert "predicted_scores" not in calls and "low_rank_product" in calls
    assert_close_rms(score, composed)


@pytest.mark.usefixtures("with_a_provider")
def test_golden_and_idempotent() -> None:
    captured, outcome = fused(Head(MLP(silu_gate)))
    assert outcome.stats["fused"] == 1 and not outcome.rejections
    called = targets(captured.gm)
    assert called.count("predicted_scores") == 1
    # Nothing of what was composed is left.
    assert not {"low_rank_product", "linalg_vector_norm", "where", "unsqueeze"} & set(called)
    assert_golden(PASS, render(captured))
    assert not run_passes(captured, PASS)[PASS].changed


@pytest.mark.usefixtures("with_a_provider")
def test_the_source_of_the_kernels_is_kept() -> None:
    captured, _ = fused(Head(MLP(silu_gate)))
    ((name, source),) = captured.ctx.results.kernel_sources.items()
    assert name == "body.0.score.py" and source.startswith('"""body.0.score.\n')
    functions = [each.name for each in ast.parse(source).body if isinstance(each, ast.FunctionDef)]
    assert functions == ["thin_products", "scores"]


@pytest.mark.usefixtures("with_a_provider")
def test_repeated_sites() -> None:
    model = Head(*(MLP(silu_gate) for _ in range(3)))
    captured, outcome = fused(model, layer_sparsity={"body.0": 0.5, "body.2": 0.5})
    assert outcome.stats["fused"] == 2 and list(captured.ctx.results.kernel_sources) == [
        "body.0.score.py",
        "body.2.score.py",
    ]


@pytest.mark.usefixtures("with_a_provider")
@pytest.mark.parametrize("dim", [0, 1])
def test_dynamic_sizes(dim: int) -> None:
    assert fused(Head(MLP(silu_gate)), dynamic=dim)[1].changed


def written_and_read(m: Any, x: Tensor) -> Tensor:
    up = m.up(x)
    return m.down(up.mul_(2) * up)


@pytest.mark.usefixtures("with_a_provider")
@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda m, x: m.down(torch.cos(m.up(x))), "cos has no formula"),
        (lambda m, x: m.down(F.silu(m.up(x)) ** 2.3), "a power of 2.3"),
        (lambda m, x: m.down(m.up(x) * float("inf")), "inf is no number that a formula can hold"),
        (lambda m, x: m.down(F.silu(m.up(x)) / x.shape[1]), "is no tensor"),
        (written_and_read, "which is read again"),
    ],
)
def test_a_region_without_a_formula_stays_composed(function: Function, reason: str) -> None:
    captured, outcome = fused(Head(MLP(function)), dynamic=1)
    assert (
        not outcome.changed and "low_rank_product" in targets(captured.gm) and not captured.ctx.results.kernel_sources
    )
    (found,) = rejections(outcome)
    assert reason in found


def test_factors_of_a_large_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PassContext, "op_call", lambda self, plan: OpCall("cuda", torch.bfloat16, rank=64))
    _, outcome = fused(Head(MLP(silu_gate)))
    assert not outcome.changed
    assert rejections(outcome) == ["triton: keeps factors of rank 63 at most in registers, these have 64"]


def test_asked_for_where_it_does_not_run() -> None:
    captured, outcome = fused(Head(MLP(silu_gate)))
    assert not outcome.changed and rejections(outcome) == ["triton: runs on NVIDIA GPUs, not on cpu"]
    assert "predicted_scores" not in targets(captured.gm)


@pytest.mark.usefixtures("with_a_provider")
@pytest.mark.parametrize(
    "options", [{"kernels": "measured"}, {"channel_selection": "random"}, {"preset": "exact", "layer_sparsity": None}]
)
def test_nothing_to_fuse(options: dict[str, Any]) -> None:
    captured, outcome = fused(Head(MLP(silu_gate)), **options)
    assert not outcome.changed and not outcome.rejections
    assert "predicted_scores" not in targets(captured.gm)
