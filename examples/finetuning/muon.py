"""Muon in fp32: momentum whose step is made orthogonal by Newton-Schulz iterations.

`torch.optim.Muon` iterates in bf16. A CPU without bf16 instructions multiplies bf16 matrices some fifty times slower
than fp32 ones, which made pre-training the longest part of the demo by far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b and c of the iteration X <- a X + (b G + c G G) X, G = X X' (https://kellerjordan.github.io/posts/muon)."""
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Steps of equal size in all directions of a matrix, with Nesterov momentum.

    Args:
        params: matrices, (out, in).
        lr: learning rate, as AdamW's: steps have the RMS that AdamW's have (arXiv 2502.16982, section 2.2).
        momentum: of the gradient's running mean.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Update the parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                mean.lerp_(parameter.grad, 1 - group["momentum"])
                direction = orthogonal(parameter.grad.lerp(mean, group["momentum"]))
                parameter.sub_(direction, alpha=0.2 * max(parameter.shape) ** 0.5 * group["lr"])
        return loss


def orthogonal(matrix: Tensor) -> Tensor:
    """Return a matrix with the singular vectors of this one, and singular values between about 0.7 and 1.2."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
