"""The small network from a standardised distance to a score (the paper's "neural" weights)."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

__all__ = ["fitted_scorer"]

_WIDTH, _STEPS, _RATE = 16, 300, 1e-2
"""A function of one number that n rows of a bank decide: more units would fit their noise."""


class _Scorer(nn.Module):
    """f(z) = z + a network of z that starts at zero: before the first step, weights are a softmin with T = 1."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, _WIDTH), nn.Tanh(), nn.Linear(_WIDTH, 1, bias=False))

    def forward(self, z: Tensor) -> Tensor:
        found = self.layers(z.unsqueeze(-1)).squeeze(-1)
        return z + cast("Tensor", found)


def fitted_scorer(loss: Callable[[Callable[[Tensor], Tensor]], Tensor]) -> tuple[Callable[[Tensor], Tensor], float]:
    """Fit the network to a loss of it, always from the same start.

    No gradient of the base model is taken: the loss is one of weights and inner products.

    Returns:
        The network that had the smallest loss, and that loss.
    """
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        scorer = _Scorer().double()
        last = cast("nn.Linear", scorer.layers[-1])
        nn.init.zeros_(last.weight)
        optimizer = torch.optim.Adam(scorer.parameters(), lr=_RATE)
        best, kept = float("inf"), {}
        for _ in range(_STEPS + 1):
            found = loss(scorer)
            if float(found.detach()) < best:
                best, kept = float(found.detach()), {name: each.clone() for name, each in scorer.state_dict().items()}
            optimizer.zero_grad()
            torch.autograd.backward(found)
            optimizer.step()
    scorer.load_state_dict(kept)
    return scorer, best
