"""Compare the two libraries for products in fp32 that PyTorch's CPU builds carry: MKL, which ATen uses, and oneDNN.

    python benchmarks/gemm.py

Prints, for weights of several sizes and numbers of tokens, how many times faster oneDNN is, for the product x W' and
for that of its gradient, dy W. `kernels/cpu_gemm.py` rests on it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparse_compile.torch_private.aten import onednn_linear

WEIGHTS = (
    (16, 1024),
    (36, 1024),
    (64, 1024),
    (128, 1024),
    (256, 1024),
    (1792, 512),
    (3584, 1024),
    (1024, 3584),
    (8192, 2048),
)
TOKENS = (16, 64, 256, 766, 1024, 2048)
ROUNDS = 9


def main() -> None:
    print("weight (out, in): times faster, forward/backward")
    for out, width in WEIGHTS:
        weight = torch.randn(out, width)
        cells = []
        for tokens in TOKENS:
            if tokens * out * width > 2e10:
                continue
            x, d_y = torch.randn(tokens, width), torch.randn(tokens, out)
            cells.append(f"{tokens} tokens {_ratio(x, weight):.2f}/{_ratio(d_y, weight.t()):.2f}")
        print(f"({out}, {width}):", "  ".join(cells), flush=True)


def _ratio(x: Tensor, weight: Tensor) -> float:
    """Return how many times faster oneDNN is, from the ratios within each round."""
    libraries: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (linear, onednn_linear)
    ratios = []
    for _ in range(ROUNDS):
        mkl, onednn = (_seconds(library, x, weight) for library in libraries)
        ratios.append(mkl / onednn)
    return statistics.median(ratios)


def _seconds(library: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor) -> float:
    start = time.perf_counter()
    library(x, weight)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
