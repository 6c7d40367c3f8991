"""The floor of each kernel of one sparse Llama-3-8B block, on paper: bytes, FLOPs, and the least time they allow.

    python benchmarks/roofline.py                           # math10k-8b and csr-8b, as Markdown
    python benchmarks/roofline.py --workload csr-8b

A kernel reads its operands and writes its result once, from and to memory; a frozen product has a forward and the
gradient of its input. The floor is the larger of bytes over bandwidth and FLOPs over the rate of the matrix units.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sparse_compile.options.presets import kept_count

BYTES = 2
"""Of an element: activations and weights are bf16."""


@dataclass(frozen=True)
class Device:
    """What a GPU can do.

    Attributes:
        name: of the card.
        bandwidth: bytes a second, copied.
        rate: FLOPs a second of dense bf16 products with fp32 sums.
    """

    name: str
    bandwidth: float
    rate: float


DEVICES = (Device("H200", 4.3e12, 780e12), Device("A6000", 0.768e12, 155e12))
"""The first as measured on such a card, the second by its data sheet."""


@dataclass(frozen=True)
class Case:
    """One workload on a Llama-3-8B.

    Attributes:
        name: of the workload.
        labels: labelled tokens at the end of each sequence of 512; the position before them predicts the first.
        ffn_sparsity: of the feed-forward block.
        attention_sparsity: of the attention block.
    """

    name: str
    labels: int
    ffn_sparsity: float
    attention_sparsity: float
    batch: int = 8
    length: int = 512
    hidden: int = 4096
    ffn: int = 14336
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    rank: int = 32

    @property
    def tokens(self) -> int:
        """All tokens of a batch."""
        return self.batch * self.length

    @property
    def context(self) -> int:
        """Tokens that are computed sparsely."""
        return self.batch * (self.length - self.labels - 1)


CASES = {
    "math10k-8b": Case("math10k-8b", 128, 0.99, 0.75),
    "csr-8b": Case("csr-8b", 3, 0.97, 0.2),
}


@dataclass(frozen=True)
class Kernel:
    """What one kernel does in a forward and a backward.

    Attributes:
        part: what it belongs to.
        name: what it computes.
        flops: of its products.
        traffic: bytes that it reads and writes.
    """

    part: str
    name: str
    flops: float
    traffic: float

    def floor(self, device: Device) -> float:
        """Return the least seconds it can take."""
        return max(self.flops / device.rate, self.traffic / device.bandwidth)


def product(part: str, name: str, rows: int, columns: int, depth: int, *, outputs: int = 1, repeats: int = 1) -> Kernel:
    """Return a product (rows, depth) x (depth, columns), of which `outputs` results are written."""
    traffic = BYTES * (rows * depth + depth * columns + outputs * rows * columns)
    return Kernel(part, name, repeats * 2.0 * rows * columns * depth, repeats * float(traffic))


def moved(part: str, name: str, elements: float) -> Kernel:
    """Return a kernel that reads and writes that many elements in all."""
    return Kernel(part, name, 0.0, BYTES * elements)


def sparse_block(case: Case) -> Iterator[Kernel]:
    """Yield the kernels of a sparse block, forward and backward."""
    n, c, o = case.tokens, case.context, case.tokens - case.context
    h, kept = case.hidden, kept_count(case.ffn, case.ffn_sparsity)
    kv, groups = case.kv_heads * case.head_dim, case.heads // case.kv_heads
    kept_kv = kept_count(kv, case.attention_sparsity)
    kept_q, q = kept_kv * groups, kv * groups
    yield moved("attention", "split and merge of tokens", 2 * (2 * n * h + 2 * n * (q + 2 * kv)))
    yield product("attention", "predictor: x A of q, k, v", c, 3 * 8, h)
    yield Kernel("attention", "predictor: norms, top-k", 0.0, 4.0 * (q + 2 * kv) * 8)
    yield product("attention", "q, k, v of context, forward", c, kept_q + 2 * kept_kv, h)
    yield product("attention", "q, k, v of context, gradient of x", c, h, kept_q + 2 * kept_kv)
    yield product("attention", "q, k, v of output tokens", o, q + 2 * kv, h, repeats=2)
    yield product("attention", "o of context, forward and gradient", c, h, kept_q, repeats=2)
    yield product("attention", "o of output tokens", o, h, q, repeats=2)
    yield from common(case)
    yield moved("feed-forward", "split and merge of tokens", 2 * (2 * n * h + 2 * n * h))
    yield product("feed-forward", "predictor: 16 tokens a sequence", 16 * case.batch, 2 * case.ffn, 8)
    yield product("feed-forward", "gate, up, activation of context", c, 2 * kept, h, outputs=2)
    yield moved("feed-forward", "activation backward of context", 5.0 * c * kept)
    yield product("feed-forward", "gradient of x of context", c, h, 2 * kept)
    yield product("feed-forward", "down of context, forward and gradient", c, h, kept, repeats=2)
    yield product("feed-forward", "gate, up of output tokens", o, 2 * case.ffn, h, repeats=2)
    yield product("feed-forward", "down of output tokens", o, h, case.ffn, repeats=2)


def dense_block(case: Case) -> Iterator[Kernel]:
    """Yield the kernels of the same block without sparsity."""
    n, h = case.tokens, case.hidden
    q, kv = case.heads * case.head_dim, case.kv_heads * case.head_dim
    yield product("attention", "q, k, v", n, q + 2 * kv, h, repeats=2)
    yield product("attention", "o", n, h, q, repeats=2)
    yield from common(case)
    yield product("feed-forward", "gate, up", n, 2 * case.ffn, h, repeats=2)
    yield moved("feed-forward", "activation, forward and backward", (3 + 5) * n * case.ffn)
    yield product("feed-forward", "down", n, h, case.ffn, repeats=2)


def common(case: Case) -> Iterator[Kernel]:
    """Yield what both blocks have: attention itself, norms and residuals, adapters on q, k, v, o."""
    n, h = case.tokens, case.hidden
    q, kv = case.heads * case.head_dim, case.kv_heads * case.head_dim
    scores = 2.0 * case.batch * case.heads * case.length**2 * case.head_dim / 2
    # Two products forward, five backward; of each score only those below the diagonal.
    yield Kernel("attention", "attention itself", 7 * scores, BYTES * 3.0 * n * (2 * q + 2 * kv))
    thin = 3 * 2.0 * n * case.rank * (3 * h + q + q + 2 * kv + h)
    yield Kernel("attention", "adapters of q, k, v, o", thin, BYTES * 3.0 * n * (2 * h + 2 * q + 2 * kv))
    yield moved("both", "norms and residuals", 2 * 2 * 4.0 * n * h)


def table(case: Case) -> str:
    """Return the Markdown table of one workload."""
    kernels, dense = list(sparse_block(case)), list(dense_block(case))
    totals = {device: sum(kernel.floor(device) for kernel in kernels) for device in DEVICES}
    names = " | ".join(f"{device.name}, us | share" for device in DEVICES)
    lines = [f"| part | kernel | GFLOP | MB | {names} |", "|---" * (4 + 2 * len(DEVICES)) + "|"]
    for kernel in kernels:
        floors = " | ".join(
            f"{1e6 * kernel.floor(device):.1f} | {kernel.floor(device) / totals[device]:.0%}" for device in DEVICES
        )
        lines.append(
            f"| {kernel.part} | {kernel.name} | {kernel.flops / 1e9:.1f} | {kernel.traffic / 1e6:.1f} | {floors} |"
        )
    for name, each in (("sparse block", kernels), ("dense block", dense)):
        times = " | ".join(f"{1e6 * sum(kernel.floor(device) for kernel in each):.0f} | " for device in DEVICES)
        flops, traffic = (sum(getattr(kernel, part) for kernel in each) for part in ("flops", "traffic"))
        lines.append(f"| **{name}** | | {flops / 1e9:.0f} | {traffic / 1e6:.0f} | {times}|")
    limits = (
        f"{sum(kernel.floor(device) for kernel in dense) / totals[device]:.2f}x on {device.name}" for device in DEVICES
    )
    return "\n".join(lines) + f"\n\nA block can gain at most {', '.join(limits)}."


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=sorted(CASES), action="append", help="default: both")
    args = parser.parse_args(argv)
    for name in args.workload or CASES:
        case = CASES[name]
        print(f"### `{name}`: {case.context} of {case.tokens} tokens are context\n\n{table(case)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
