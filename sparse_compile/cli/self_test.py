"""Train a tiny model under the backend and eagerly, and compare.

The model's dropped channels are exactly zero, and its weights are of the predictor's rank. So the sparse function is
the dense one, and eager PyTorch tells whether what ran is right.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from sparse_compile.compiler.compile import compile as compile_sparse
from sparse_compile.kernels.providers import REFERENCE, OpCall, triton_runs
from sparse_compile.training.session import known_sessions

__all__ = ["Trial", "self_test"]

_STEPS: Final = 2
_HIDDEN, _CHANNELS, _LIVE, _VOCABULARY, _RANK = 32, 64, 16, 48, 4
_SPARSITY: Final = 1 - _LIVE / _CHANNELS
_TOLERANCE: Final = 1e-3
"""Of losses and adapters in fp32, relative to the largest value: rounding is a hundredth of it."""

_LOWERINGS: Final = ("lower_sparse_ops", "lower_frozen_linears", "lower_causal_attention")
"""The passes that choose providers: without them ops run their plain PyTorch bodies."""


@dataclass(frozen=True)
class Trial:
    """How the tiny model was trained in one way.

    Attributes:
        name: the way.
        providers: what ran the products of its sparse site.
        seconds: what it took, compilation included.
        error: largest difference to eager, relative; None where nothing was compared.
        fault: what went wrong; empty where all is well.
    """

    name: str
    providers: str
    seconds: float
    error: float | None
    fault: str


class _Adapted(nn.Module):
    """A frozen linear layer with a LoRA branch."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        weight = torch.randn(outputs, _RANK) @ torch.randn(_RANK, inputs) / (_RANK * inputs) ** 0.5
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.lora_a = nn.Parameter(torch.randn(_RANK, inputs) / inputs**0.5)
        self.lora_b = nn.Parameter(torch.zeros(outputs, _RANK))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight) + x @ self.lora_a.T @ self.lora_b.T


class _Block(nn.Module):
    """A gated feed-forward block of which all but some channels are silent."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(_HIDDEN)
        self.gate, self.up = _Adapted(_HIDDEN, _CHANNELS), _Adapted(_HIDDEN, _CHANNELS)
        self.down = _Adapted(_CHANNELS, _HIDDEN)
        silent = torch.randperm(_CHANNELS)[_LIVE:]
        for layer in (self.gate, self.up):
            layer.weight[silent] = 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        changed: Tensor = self.down(nn.functional.silu(self.gate(y)) * self.up(y))
        return x + changed


class _TinyModel(nn.Module):
    """An embedding, one block, a mean over what stands before, a head, and the loss of the next token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_VOCABULARY, _HIDDEN)
        self.mlp = _Block()
        self.head = nn.Linear(_HIDDEN, _VOCABULARY, bias=False)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("lora_" in name)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.mlp(self.embedding(tokens))
        # Tokens meet here, or rows that the loss ignores would leave the block before it could be sparse.
        x = x + x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        logits = self.head(x)
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def self_test(device: torch.device) -> list[Trial]:
    """Train in every way that this machine has: the exact passes, and sparsity by each set of providers.

    Args:
        device: where the model trains.
    """
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = _TinyModel()
        tokens = torch.randint(_VOCABULARY, (4, 32))
    model, tokens = model.to(device), tokens.to(device)
    labels = tokens.clone()
    labels[:, :24] = -100
    expected = _trained(copy.deepcopy(model), tokens, labels)
    sparse = {"layer_sparsity": {"mlp": _SPARSITY}, "start_step": 0, "strict": True}
    ways: dict[str, dict[str, Any]] = {
        "exact": {"preset": "exact", "strict": True},
        "sparse, by the reference": {**sparse, "disable": _LOWERINGS},
        "sparse, as measured": sparse,
    }
    if triton_runs(OpCall(device.type, torch.float32)) is None:
        ways["sparse, by Triton"] = {**sparse, "kernels": "triton"}
    return [_trial(name, options, copy.deepcopy(model), tokens, labels, expected) for name, options in ways.items()]


def _trained(model: nn.Module, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Take two steps, and return the losses and what the adapters became."""
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.5)
    found = {}
    for step in range(_STEPS):
        loss = model(tokens, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found[f"the loss of step {step}"] = loss.detach()
    return found | {name: each.detach() for name, each in trained.items()}


def _trial(
    name: str,
    options: Mapping[str, Any],
    model: nn.Module,
    tokens: Tensor,
    labels: Tensor,
    expected: Mapping[str, Tensor],
) -> Trial:
    """Train in one way, and compare; whatever is raised is the finding."""
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "sparselora")
            found = _trained(compile_sparse(model, options), tokens, labels)
    except Exception as error:
        return Trial(name, "", time.perf_counter() - start, None, f"{type(error).__name__}: {error}")
    seconds = time.perf_counter() - start
    sessions = known_sessions([each for each in model.parameters() if each.requires_grad])
    sites = [site for session in sessions for report in session.reports for site in report.sites if site.sparse]
    errors = {key: float((found[key] - value).abs().max() / value.abs().max()) for key, value in expected.items()}
    worst = max(errors, key=lambda key: errors[key])
    fault = "" if errors[worst] <= _TOLERANCE else f"{worst} is off by {errors[worst]:.1e}"
    if not sessions:
        fault = "the backend compiled nothing"
    elif "layer_sparsity" in options and not sites:
        fault = "no site was sparse"
    chosen = dict.fromkeys(site.provider for site in sites)
    providers = REFERENCE if sites and "disable" in options else "+".join(chosen)
    return Trial(name, providers, seconds, errors[worst], fault)
