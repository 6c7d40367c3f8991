"""Feed-forward blocks are found by dataflow, whatever their activation and their names."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from graphs import Captured, Head, capture, frozen, lora, rejections, run_passes, tokens
from models import normal
from sparse_compile.passes.protocol import PassOutcome

PASSES = ("canonicalize_linears", "find_projections", "find_ffn")


class MLP(nn.Module):
    """Two in-projections, an out-projection, a scale a channel, and a function of them all."""

    def __init__(self, function: Callable[[MLP, Tensor], object], adapters: bool = True):
        super().__init__()
        self.function = function
        layer = lora if adapters else nn.Linear
        self.gate, self.up, self.down = layer(8, 12), layer(8, 12), layer(12, 8)
        self.narrow, self.other = layer(8, 1), layer(12, 8)
        self.scale = nn.Parameter(torch.empty(12))
        frozen(self)

    def forward(self, x: Tensor) -> object:
        return self.function(self, x)


def find(function: Callable[[MLP, Tensor], object], adapters: bool = True) -> tuple[Captured, PassOutcome]:
    captured = capture(MLP(function, adapters), normal(2, 3, 8))
    return captured, run_passes(captured, *PASSES)["find_ffn"]


GATED: dict[str, Callable[[MLP, Tensor], object]] = {
    "silu gate": lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)),
    "gelu gate, up first": lambda m, x: m.down(m.up(x) * F.gelu(m.gate(x), approximate="tanh")),
    "sigmoid written out": lambda m, x: m.down((g := m.gate(x)) * torch.sigmoid(g) * m.up(x)),
    "clamped as in GPT-OSS": lambda m, x: m.down(m.gate(x).clamp(max=7.0) * (m.up(x).clamp(-7.0, 7.0) + 1)),
    "no activation": lambda m, x: m.down(m.gate(x) * m.up(x)),
    "casts": lambda m, x: m.down((F.silu(m.gate(x).float()) * m.up(x).float()).to(x.dtype)),
    "in place": lambda m, x: m.down(F.silu(m.gate(x)).mul_(m.up(x))),
}
UNGATED: dict[str, Callable[[MLP, Tensor], object]] = {
    "relu": lambda m, x: m.down(F.relu(m.up(x))),
    "relu squared": lambda m, x: m.down(F.relu(m.up(x)).square()),
    "gelu": lambda m, x: m.down(F.gelu(m.up(x))),
    "gelu written out": lambda m, x: m.down(0.5 * (h := m.up(x)) * (1 + torch.erf(h / 2**0.5))),
    "pow": lambda m, x: m.down(m.up(x).relu() ** 2),
    "mish, dropout": lambda m, x: m.down(F.dropout(F.mish(m.up(x)), 0.1)),
    "softplus": lambda m, x: m.down(F.softplus(m.up(x))),
    "tanh": lambda m, x: m.down(m.up(x).tanh().contiguous()),
    "two branches": lambda m, x: m.down(torch.where((h := m.up(x)) > 0, h.square(), h.exp())),
}


@pytest.mark.parametrize("adapters", [True, False], ids=["adapters", "bare"])
@pytest.mark.parametrize("name", [*GATED, *UNGATED])
def test_activation(name: str, adapters: bool) -> None:
    captured, outcome = find((GATED | UNGATED)[name], adapters)
    (site,) = captured.ctx.facts.ffn_sites
    assert {projection.name for projection in site.inputs} == ({"gate", "up"} if name in GATED else {"up"})
    assert site.output.name == "down" and site.channels == 12 and not site.vectors
    assert site.region[-1] == site.output.source
    assert not outcome.rejections


def test_scale_vector_and_scalar() -> None:
    captured, _ = find(lambda m, x: m.down(F.silu(m.up(x)) * m.scale * x.max().detach()))
    (site,) = captured.ctx.facts.ffn_sites
    assert len(site.vectors) == 2 and any("scale" in vector for vector in site.vectors)


DECLINED: dict[str, tuple[Callable[[MLP, Tensor], object], str]] = {
    "different inputs": (
        lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x + 1)),
        "its in-projections read different tensors",
    ),
    "a gate for all channels": (
        lambda m, x: m.down(torch.sigmoid(m.narrow(x)) * m.up(x)),
        "narrow is 1 wide, the block's intermediate 12",
    ),
    "the intermediate is returned": (
        lambda m, x: (m.down(h := F.relu(m.up(x))), h),
        "its intermediate {} is also read by output",
    ),
    "a second layer reads it": (
        lambda m, x: m.down(h := F.relu(m.up(x))) + m.other(h),
        "its intermediate {} is also read by {}",
    ),
    "an in-projection is read outside": (
        lambda m, x: m.down(F.relu(h := m.up(x))) + h.sum(),
        "its intermediate {} is also read by sum_1",
    ),
}


@pytest.mark.parametrize("name", DECLINED)
def test_declines(name: str) -> None:
    function, reason = DECLINED[name]
    captured, outcome = find(function)
    assert not captured.ctx.facts.ffn_sites
    found = rejections(outcome)
    assert found, "no near miss was reported"
    for text in found:
        parts = reason.split("{}")
        assert text.startswith(parts[0]) and parts[-1] in text


UNRELATED: dict[str, Callable[[MLP, Tensor], object]] = {
    "a norm in between": lambda m, x: m.down(F.layer_norm(m.up(x), (12,))),
    "a softmax in between": lambda m, x: m.down(m.up(x).softmax(-1)),
    "one linear": lambda m, x: m.up(x),
    "linears in a row": lambda m, x: m.down(m.up(x)),
    "a tensor of all tokens enters": lambda m, x: m.down(m.up(x) * x.sum(-1, keepdim=True)),
}


@pytest.mark.parametrize("name", UNRELATED)
def test_unrelated(name: str) -> None:
    captured, outcome = find(UNRELATED[name])
    assert not captured.ctx.facts.ffn_sites and not outcome.rejections


def test_trained_base_is_no_site() -> None:
    model = MLP(UNGATED["relu"])
    model.up.base_layer.weight.requires_grad_(True)
    captured = capture(model, normal(2, 3, 8))
    run_passes(captured, *PASSES)
    assert not captured.ctx.facts.ffn_sites


def test_chained_sites_have_names_and_order() -> None:
    model = Head(MLP(GATED["silu gate"]), MLP(UNGATED["relu"]))
    captured = capture(model, *tokens())
    run_passes(captured, *PASSES)
    first, second = captured.ctx.facts.ffn_sites
    assert (first.name, first.index, second.name, second.index) == ("body.0", 0, "body.1", 1)
    assert second.source == first.output.output


def test_one_module_used_twice() -> None:
    mlp = MLP(GATED["silu gate"])
    captured = capture(Head(mlp, mlp), *tokens())
    run_passes(captured, *PASSES)
    assert len(captured.ctx.facts.ffn_sites) == 2


def test_idempotent_and_dynamic() -> None:
    ids, labels = tokens(rows=3)
    captured = capture(Head(MLP(GATED["silu gate"])), ids, labels, dynamic=((ids, 0), (labels, 0)))
    run_passes(captured, *PASSES)
    first = captured.ctx.facts.ffn_sites
    assert len(first) == 1
    run_passes(captured, "find_ffn")
    assert captured.ctx.facts.ffn_sites == first
