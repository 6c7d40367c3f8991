"""A sparse feed-forward block computes what the masked-dense oracle does, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from graphs import (
    ANALYSES,
    Head,
    aot_eager,
    assert_golden,
    assert_like_masked_dense,
    capture,
    frozen,
    gradients_of,
    graph_eager,
    lora,
    render,
    run_passes,
    run_rewritten,
    targets,
    tokens,
)
from models import random_mask
from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.reference import MaskedFFN
from sweeps import slow
from tolerances import assert_close_rms

PASS = "sparsify_ffn"


class MLP(nn.Module):
    """Projections and a function of them; the out-projection's input is the intermediate."""

    def __init__(self, function: Callable[[MLP, Tensor], Tensor], adapters: bool = True, bias: bool = True):
        super().__init__()
        self.function = function

        def layer(inputs: int, outputs: int) -> nn.Module:
            return lora(inputs, outputs, bias=bias) if adapters else nn.Linear(inputs, outputs, bias=bias)

        self.gate, self.up, self.down = layer(8, 12), layer(8, 12), layer(12, 8)
        self.scale = nn.Parameter(torch.empty(12))
        self.broad = nn.Parameter(torch.empty(1, 1, 12))
        frozen(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


FUNCTIONS: dict[str, Callable[[MLP, Tensor], Tensor]] = {
    "silu gate": lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)),
    "gelu gate, up first": lambda m, x: m.down(m.up(x) * F.gelu(m.gate(x), approximate="tanh")),
    "relu squared": lambda m, x: m.down(F.relu(m.up(x)).square()),
    "a scale a channel": lambda m, x: m.down(F.silu(m.gate(x)) * m.scale * m.up(x)),
    "a scale of three dimensions": lambda m, x: m.down(F.gelu(m.up(x)) * m.broad),
    "a number from outside": lambda m, x: m.down(F.gelu(m.up(x)) * m.scale.sum()),
    "a sigmoid that is not zero at zero": lambda m, x: m.down(torch.sigmoid(m.up(x))),
    "flattened": lambda m, x: m.down(F.silu(m.gate(y := x.view(-1, 8))) * m.up(y)).view(x.shape),
    "residual": lambda m, x: x + m.down(F.gelu(m.up(x))),
}


def sites(model: Head) -> Callable[[dict[str, Tensor]], list[MaskedFFN]]:
    return lambda kept: [MaskedFFN(model.get_submodule(f"{name}.down"), channels) for name, channels in kept.items()]


def check(
    model: Head,
    layer_sparsity: dict[str, float],
    inputs: tuple[Tensor, Tensor] | None = None,
    compiler: Callable[..., Any] = graph_eager,
) -> Any:
    inputs = inputs or tokens(rows=3)
    config = SparseLoRAConfig(layer_sparsity=layer_sparsity)
    return assert_like_masked_dense(
        model, *inputs, labels=inputs[1], config=config, sites=sites(model), compiler=compiler
    )


@pytest.mark.parametrize("adapters", [True, False], ids=["adapters", "bare"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_and_gradients(name: str, adapters: bool) -> None:
    ran = check(Head(lora(8, 8), MLP(FUNCTIONS[name], adapters)), {"body.1": 0.75})
    assert PASS in {record.name for record in ran.result.records if record.changed}


@pytest.mark.parametrize("bias", [slow(True), False])
def test_chained_sites(bias: bool) -> None:
    """One site's output is the next one's input."""
    blocks = [MLP(FUNCTIONS[name], bias=bias) for name in ("silu gate", "relu squared", "a scale a channel")]
    ran = check(Head(*blocks), {"0": 0.5, "1": 0.75, "2": 0.25}, compiler=aot_eager)
    assert next(record for record in ran.result.records if record.name == PASS).stats["sites"] == 3


def test_a_sparse_site_between_dense_ones() -> None:
    check(Head(*(MLP(FUNCTIONS["silu gate"]) for _ in range(3))), {"1": 0.75})


@pytest.mark.parametrize("adapters", [True, False], ids=["adapters", "bare"])
def test_one_channel(adapters: bool) -> None:
    check(Head(lora(8, 8), MLP(FUNCTIONS["silu gate"], adapters)), {"body.1": 0.99}, compiler=aot_eager)


def test_rank_one() -> None:
    mlp = MLP(FUNCTIONS["silu gate"])
    mlp.gate, mlp.down = lora(8, 12, rank=1), lora(12, 8, rank=1)
    check(Head(mlp), {"0": 0.5}, compiler=aot_eager)


def test_adapters_on_some_projections() -> None:
    mlp = MLP(FUNCTIONS["silu gate"])
    mlp.up, mlp.down = mlp.up.base_layer, mlp.down.base_layer
    check(Head(mlp), {"0": 0.5})


def test_conv1d() -> None:
    from transformers.pytorch_utils import Conv1D

    mlp = MLP(FUNCTIONS["relu squared"], adapters=False)
    mlp.up, mlp.down = Conv1D(12, 8), Conv1D(8, 12)
    frozen(mlp)
    check(Head(lora(8, 8), mlp), {"body.1": 0.5})


def test_without_context_nothing_is_lost() -> None:
    model, (ids, _) = Head(MLP(FUNCTIONS["silu gate"])), tokens()
    ran = run_rewritten(model, ids, ids, config=SparseLoRAConfig(layer_sparsity={"0": 0.75}))
    assert ran.result.sparse is not None
    expected = gradients_of(model(ids, ids), model)
    assert_close_rms(ran.value, model(ids, ids))
    for name, gradient in gradients_of(ran.value, model).items():
        assert_close_rms(gradient, expected[name], name=name)


def test_without_output_tokens_all_is_sparse() -> None:
    """The mean of no label is NaN, so the loss is a sum, and a term that reads no label is added."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        ignored = F.cross_entropy(logits[:, :-1].reshape(-1, 11), labels[:, 1:].reshape(-1), reduction="sum")
        return ignored + logits.square().mean()

    ids, _ = tokens()
    check(Head(MLP(FUNCTIONS["silu gate"]), loss=loss), {"0": 0.75}, (ids, torch.full_like(ids, -100)))


def test_ragged_roles() -> None:
    ids, _ = tokens(rows=4, length=9)
    check(Head(MLP(FUNCTIONS["silu gate"])), {"0": 0.75}, (ids, ids.masked_fill(random_mask(4, 9), -100)))


def test_dropout_before_an_adapter_stays_as_drawn() -> None:
    """The thin product runs on all tokens before the split: one draw of N tokens, as in eager."""

    class DropoutLoRA(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = lora(8, 12)

        def forward(self, x: Tensor) -> Tensor:
            thin = F.linear(F.dropout(x, 0.5, self.training), self.layer.lora_A)
            return self.layer.base_layer(x) + F.linear(thin, self.layer.lora_B) * 2.0

    mlp = MLP(FUNCTIONS["relu squared"])
    mlp.up = DropoutLoRA()
    model = Head(mlp)
    captured = capture(model, *tokens(), config=SparseLoRAConfig(layer_sparsity={"0": 0.5}))
    run_passes(captured, *ANALYSES, "insert_predictors", PASS)
    (up,) = (found for found in captured.ctx.facts.projections.values() if found.name.startswith("body.0.up"))
    assert up.branches[0].dropout is not None
    called = targets(captured.gm)
    # One draw, and none among the copies of the two segments.
    assert called.count("dropout") == 1 and called.index("dropout") < called.index("take_rows")


def test_golden_and_idempotent() -> None:
    model = Head(MLP(FUNCTIONS["relu squared"], adapters=False, bias=False))
    captured = capture(model, *tokens(), config=SparseLoRAConfig(layer_sparsity={"body.0": 0.75}))
    outcome = run_passes(captured, *ANALYSES, "insert_predictors", PASS)[PASS]
    assert outcome.changed and outcome.stats["sites"] == 1
    assert_golden(PASS, render(captured))
    assert "gathered_linear" in targets(captured.gm) and targets(captured.gm).count("split_tokens") == 1


def test_nothing_planned() -> None:
    captured = capture(Head(MLP(FUNCTIONS["silu gate"])), *tokens(), config=SparseLoRAConfig(preset="exact"))
    assert not run_passes(captured, *ANALYSES, "insert_predictors", PASS)[PASS].changed


@pytest.mark.slow
def test_dynamic_sizes() -> None:
    """One compiled graph serves another batch size and another split."""
    model = Head(MLP(FUNCTIONS["silu gate"]))
    config = SparseLoRAConfig(layer_sparsity={"0": 0.5})
    from sparse_compile.kernels.channel_selection import record_channels
    from sparse_compile.reference import masked_dense, output_mask_from_labels

    compiled = torch.compile(model, backend=backend_of(config), dynamic=True)
    for rows, context in ((3, 4), (5, 2), (2, 5)):
        ids, labels = tokens(rows=rows, length=rows + 5, context=context)
        with record_channels() as chosen:
            loss = compiled(ids, labels)
        with masked_dense(sites(model)({k: v[0] for k, v in chosen.items()}), output_mask_from_labels(labels)):
            expected = model(ids, labels)
        assert torch.allclose(loss, expected, rtol=1e-12)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def backend_of(config: SparseLoRAConfig) -> Callable[..., Any]:
    from sparse_compile.compiler.capture import capture_context
    from sparse_compile.compiler.runner import run_pipeline

    torch._dynamo.utils.counters.clear()

    def backend(gm: Any, example_inputs: Any) -> Any:
        result = run_pipeline(gm, capture_context(gm, example_inputs, config))
        assert result.sparse is not None
        return aot_eager(result.sparse, example_inputs)

    return backend
