"""Every spelling of a linear layer becomes `linear`; what does nothing disappears."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from graphs import assert_golden, capture, gradients_of, rejections, render, run_passes, run_rewritten, targets
from models import normal
from sparse_compile.graph.vocabulary import LINEAR
from tolerances import assert_close_rms

PASS = "canonicalize_linears"


class Layer(nn.Module):
    """Weights in both layouts, and a function of them and x."""

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function
        self.w = nn.Parameter(normal(6, 4, seed=1))  # (out, in)
        self.v = nn.Parameter(normal(4, 6, seed=2))  # (in, out)
        self.b = nn.Parameter(normal(6, seed=3))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


FLAT: dict[str, Callable[..., Tensor]] = {
    "mm": lambda m, x: torch.mm(x, m.w.t()),
    "x.mm": lambda m, x: x.mm(m.v),
    "addmm of W.t()": lambda m, x: torch.addmm(m.b, x, m.w.t()),
    "addmm of V": lambda m, x: torch.addmm(m.b, x, m.v),
    "addmm, alpha and beta spelt out": lambda m, x: torch.addmm(m.b, x, m.v, beta=1, alpha=1),
}
BATCHED: dict[str, Callable[..., Tensor]] = {
    "@ W.T": lambda m, x: x @ m.w.T,
    "@ W.mT": lambda m, x: x @ m.w.mT,
    "@ V": lambda m, x: x @ m.v,
    "matmul W.t()": lambda m, x: torch.matmul(x, m.w.t()),
    "x.matmul": lambda m, x: x.matmul(m.w.transpose(0, 1)),
    "negative dims": lambda m, x: x.matmul(m.w.transpose(-2, -1)),
    "named dims": lambda m, x: x.matmul(m.w.transpose(dim0=0, dim1=1)),
    "named order": lambda m, x: x.matmul(m.w.permute(dims=(1, 0))),
    "torch.transpose": lambda m, x: torch.matmul(x, torch.transpose(m.w, 1, 0)),
    "permute": lambda m, x: x @ m.w.permute(1, 0),
    "permute of a tuple": lambda m, x: x @ m.w.permute((1, 0)),
    "permute that moves nothing": lambda m, x: x @ m.v.permute(0, 1),
    "swapaxes": lambda m, x: x @ m.w.swapaxes(0, 1),
    "twice transposed": lambda m, x: x @ m.v.t().transpose(0, 1),
    "einsum of V": lambda m, x: torch.einsum("bsi,io->bso", x, m.v),
    "einsum of W": lambda m, x: torch.einsum("... i, o i -> ... o", x, m.w),
    "einsum of W.t()": lambda m, x: torch.einsum("bsi,io->bso", [x, m.w.t()]),
    "thrice transposed": lambda m, x: x @ m.w.t().t().T,
}


@pytest.mark.parametrize("spelling", [*FLAT, *BATCHED])
def test_spelling(spelling: str) -> None:
    model = Layer((FLAT | BATCHED)[spelling])
    x = (normal(3, 4) if spelling in FLAT else normal(2, 3, 4)).requires_grad_()
    captured = capture(model, x)
    outcome = run_passes(captured, PASS)[PASS]
    assert outcome.changed and outcome.stats["linears"] == 1 and not outcome.rejections
    (linear,) = (node for node in captured.gm.graph.nodes if node.target is LINEAR)
    assert not {"matmul", "mm", "addmm", "einsum"} & set(targets(captured.gm))
    # One transpose at most is left: of a weight that is stored as (in, out).
    assert len(targets(captured.gm)) <= 2, render(captured)
    assert linear.meta["example_value"].shape == model(x).shape

    weighting = normal(*model(x).shape, seed=4)
    ran = run_rewritten(model, x, only=(PASS,))
    used = Layer(model.function)  # gradients of unused parameters are left out
    used.load_state_dict(model.state_dict())
    for name in {"w", "v", "b"} - {node.split("_")[-2] for node in captured.ctx.env.parameters}:
        model.get_parameter(name).requires_grad_(False)
    actual, expected = (gradients_of((value * weighting).sum(), model, x) for value in (ran.value, model(x)))
    assert_close_rms(ran.value, model(x))
    for name, gradient in expected.items():
        assert_close_rms(actual[name], gradient, name=name)


def test_linear_is_left_alone() -> None:
    captured = capture(Layer(lambda m, x: F.linear(x, m.w, m.b)), normal(2, 4))
    assert not run_passes(captured, PASS)[PASS].changed


def test_conv1d() -> None:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(6, 4).double()
    captured = capture(layer, normal(2, 3, 4))
    assert run_passes(captured, PASS)[PASS].stats["linears"] == 1
    # It flattens its input for the product and gives the result its shape back: neither is left.
    assert targets(captured.gm) == ["size", "t", "linear"] or targets(captured.gm) == ["t", "linear"]
    ran = run_rewritten(layer, normal(2, 3, 4), only=(PASS,))
    assert_close_rms(ran.value, layer(normal(2, 3, 4)))


VIEWS: dict[str, tuple[Callable[..., Tensor], bool]] = {
    "view back": (lambda m, x: torch.mm(x.view(-1, 4), m.v).view(2, 3, 6), True),
    "reshape back, twice": (lambda m, x: (y := x.reshape(6, 4) @ m.v).reshape(2, 3, 6) + y.view(2, 3, 6), True),
    "another shape": (lambda m, x: torch.mm(x.view(-1, 4), m.v).view(3, 2, 6), False),
    "the flat result is read": (lambda m, x: (y := x.view(-1, 4) @ m.v).view(2, 3, 6).sum() + y, False),
    "the features were regrouped": (lambda m, x: torch.mm(x.view(-1, 4), m.v).view(2, 3, 6), False),
}


@pytest.mark.parametrize("name", VIEWS)
def test_flattening_around_a_product(name: str) -> None:
    function, dropped = VIEWS[name]
    x = normal(2, 6, 2) if name == "the features were regrouped" else normal(2, 3, 4)
    model = Layer(function)
    captured = capture(model, x)
    run_passes(captured, PASS)
    assert ({"view", "reshape"} & set(targets(captured.gm)) == set()) == dropped
    assert_close_rms(run_rewritten(model, x, only=(PASS,)).value, model(x))


UNRELATED: dict[str, Callable[..., Tensor]] = {
    "two activations": lambda m, x: x @ x.transpose(-2, -1),
    "no parameter behind it": lambda m, x: x @ (m.w * 2).t(),
    "the parameter comes first": lambda m, x: m.w @ x.transpose(-2, -1),
    "a vector": lambda m, x: x[0, 0] @ m.v,
    "einsum that leaves the features first": lambda m, x: torch.einsum("bsi,io->obs", x, m.v),
    "einsum that sums over tokens": lambda m, x: torch.einsum("bsi,io->bo", x, m.v),
    "einsum over tokens": lambda m, x: torch.einsum("bsi,so->bio", x, m.v[:3]),
    "a batch of weights": lambda m, x: x @ m.v.expand(2, 4, 6),
}


@pytest.mark.parametrize("name", UNRELATED)
def test_unrelated_products_are_left_alone(name: str) -> None:
    outcome = run_passes(capture(Layer(UNRELATED[name]), normal(2, 3, 4)), PASS)[PASS]
    assert not outcome.changed and not outcome.rejections


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda m, x: torch.addmm(m.b, x, m.v, alpha=2), "addmm with alpha or beta other than 1"),
        (lambda m, x: torch.addmm(m.b, x, m.w.t(), beta=0.5), "addmm with alpha or beta other than 1"),
        (lambda m, x: torch.addmm(x @ m.v, x, m.v), "addmm with an input that is not a bias vector"),
    ],
)
def test_declines(function: Callable[..., Tensor], reason: str) -> None:
    captured = capture(Layer(function), normal(2, 4))
    assert rejections(run_passes(captured, PASS)[PASS]) == [reason]
    assert "addmm" in targets(captured.gm)


NOTHING: dict[str, Callable[..., Tensor]] = {
    "to(dtype)": lambda m, x: x.to(torch.float64) + 1,
    "to(dtype=)": lambda m, x: x.to(dtype=torch.float64) + 1,
    "to(device)": lambda m, x: x.to("cpu") + 1,
    "double()": lambda m, x: x.double() + 1,
    "type()": lambda m, x: x.type(torch.float64) + 1,
    "type_as": lambda m, x: x.type_as(m.w) + 1,
    "dropout that is off": lambda m, x: F.dropout(x, 0.5, training=False) + 1,
    "torch.dropout that is off": lambda m, x: torch.dropout(x, 0.5, False) + 1,
    "dropout of nothing": lambda m, x: F.dropout(x, 0.0) + 1,
    "two in a row": lambda m, x: F.dropout(x.double(), 0.0).to(torch.float64) + 1,
}
SOMETHING: dict[str, Callable[..., Tensor]] = {
    "to(fp32)": lambda m, x: x.to(torch.float32) + 1,
    "float()": lambda m, x: x.float() + 1,
    "a copy": lambda m, x: x.to(torch.float64, copy=True) + 1,
    "dropout that is on": lambda m, x: F.dropout(x, 0.5) + 1,
    "torch.dropout that is on": lambda m, x: torch.dropout(x, 0.5, True) + 1,
}


@pytest.mark.parametrize("name", NOTHING)
def test_what_does_nothing_disappears(name: str) -> None:
    captured = capture(Layer(NOTHING[name]), normal(2, 4))
    outcome = run_passes(captured, PASS)[PASS]
    assert targets(captured.gm) == ["add"] and outcome.stats["casts"] + outcome.stats["dropouts"] >= 1


@pytest.mark.parametrize("name", SOMETHING)
def test_what_does_something_stays(name: str) -> None:
    captured = capture(Layer(SOMETHING[name]), normal(2, 4))
    assert not run_passes(captured, PASS)[PASS].changed
    assert len(targets(captured.gm)) == 2


@pytest.mark.parametrize("training", [True, False])
def test_dropout_module_follows_its_mode(training: bool) -> None:
    model = Layer(lambda m, x: m.dropout(x) + 1).train(training)
    assert run_passes(capture(model, normal(2, 4)), PASS)[PASS].changed is not training


def several(m: Layer, x: Tensor) -> Tensor:
    x = F.dropout(x.to(torch.float64), 0.1, training=False)
    first = x @ m.w.t()
    second = torch.addmm(m.b, x, m.v)
    return first.relu() + first * second + x @ m.w.t()


def test_golden_repeated_sites_and_several_users() -> None:
    captured = capture(Layer(several), normal(2, 4))
    before = render(captured)
    assert run_passes(captured, PASS)[PASS].stats == {"linears": 3, "scales": 0, "casts": 1, "dropouts": 1}
    assert_golden(PASS, f"{before}\n{render(captured)}")


def test_idempotent() -> None:
    captured = capture(Layer(several), normal(2, 4))
    run_passes(captured, PASS)
    assert not run_passes(captured, PASS)[PASS].changed


def test_dynamic_first_dimension() -> None:
    x = normal(5, 4)
    captured = capture(Layer(several), x, dynamic=((x, 0),))
    assert run_passes(captured, PASS)[PASS].stats["linears"] == 3
    assert "f64[s" in render(captured)
