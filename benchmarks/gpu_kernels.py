"""The generated kernels of one sparse Llama-3-8B block as calls: operands, reference in fp64, floor, seconds."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from kernels_report import SWIGLU, SWIGLU_LORA, Variant, variants
from roofline import BYTES, Case, Device
from torch import Tensor

import sparse_compile.kernels  # noqa: F401 - registers torch.ops.sparselora
from sparse_compile.kernels.codegen.formula import parsed
from sparse_compile.kernels.fused_linear.reference import saves_products
from sparse_compile.options.presets import kept_count

TOLERANCE = 2e-2
"""Largest RMS of a bf16 kernel's error, in units of the result's RMS."""

Clock = Callable[[Callable[[], object]], list[float]]
"""Times a call: the seconds of each of some launches."""

_OPS = torch.ops.sparselora


@dataclass(frozen=True)
class KernelCase:
    """A call that one of the generated kernels serves.

    Attributes:
        name: of the kernel, as in `kernels_report.variants`.
        run: computes it by the provider of that name.
        expected: computes it in fp64.
        flops: of its products.
        traffic: bytes that it must read and write.
    """

    name: str
    run: Callable[[str], Sequence[Tensor]]
    expected: Callable[[], Sequence[Tensor]]
    flops: float
    traffic: float

    def floor(self, device: Device) -> float:
        """Return the least seconds it can take."""
        return max(self.flops / device.rate, self.traffic / device.bandwidth)

    def error(self, provider: str) -> float:
        """Return the largest RMS of a result's error, in units of the result's RMS; NaN where a result has one."""
        errors = []
        for found, expected in zip(self.run(provider), self.expected(), strict=True):
            scale = expected.square().mean().sqrt()
            errors.append((found.double() - expected).square().mean().sqrt() / scale)
        return float(torch.stack(errors).max())


def compiled_variants(case: Case) -> dict[str, Variant]:
    """Return what `kernel_cases` runs as it is compiled ahead of time, by name: products with dense weights."""
    kept, kept_heads = _kept(case)
    compiled = variants(case.context, case.hidden, kept, kept_heads)
    return {name: variant for name, variant in compiled.items() if not variant.packed}


def kernel_cases(case: Case, device: str) -> Iterator[KernelCase]:
    """Yield the products of the context tokens of one sparse block, forward and backward, in bf16."""
    drawn = _Operands(device)
    rows, hidden, rank = case.context, case.hidden, case.rank
    kept, kept_heads = _kept(case)
    x, narrow = drawn(rows, hidden), [drawn(rows, kept) for _ in range(2)]
    gate, up = (drawn(case.ffn, hidden, scale=hidden**-0.5) for _ in range(2))
    down = drawn(hidden, case.ffn, scale=case.ffn**-0.5)
    thins = [drawn(rows, rank) for _ in range(2)]
    factors = [drawn(kept, rank, scale=rank**-0.5) for _ in range(2)]
    ffn = drawn.channels(case.ffn, kept)

    yield _product("gate, up", [x], [gate, up], [ffn, ffn], 0, SWIGLU)
    yield _product("gate, up with adapters", [x], [gate, up], [ffn, ffn], 0, SWIGLU_LORA, thins, factors)
    yield _gradients("activation backward", SWIGLU, x[:, :kept], narrow)
    yield _gradients("activation backward with adapters", SWIGLU_LORA, x[:, :kept], narrow, thins, factors)
    yield _product("gate, up backward", narrow, [gate.T, up.T], [ffn, ffn], 1, "p0 + p1")
    yield _product("down", narrow[:1], [down], [ffn], 1, "p0")
    second = [drawn(hidden, rank, scale=rank**-0.5)]
    yield _product("down with an adapter", narrow[:1], [down], [ffn], 1, "p0 + 2.0*t0", thins[:1], second)
    yield _product("down backward", [x], [down.T], [ffn], 0, "p0")
    heads, square = drawn.channels(hidden, kept_heads), drawn(hidden, hidden, scale=hidden**-0.5)
    values = drawn(rows, kept_heads)
    yield _product("query", [x], [square], [heads], 0, "p0")
    yield _product("query backward", [values], [square.T], [heads], 1, "p0")
    yield _product("output projection", [values], [square], [heads], 1, "p0")


def measure_kernel(case: KernelCase, providers: Sequence[str], device: Device, clock: Clock) -> dict[str, Any]:
    """Return the error and the median seconds of each provider, beside the floor.

    Raises:
        AssertionError: a provider's result is off.
    """
    row: dict[str, Any] = {"kernel": case.name, "floor": case.floor(device), "floor_of": device.name}
    for provider in providers:
        error = case.error(provider)
        assert error < TOLERANCE, f"{case.name} by {provider}: error {error:.3g} of the RMS"
        row[provider] = {"error": error, "seconds": statistics.median(clock(partial(case.run, provider)))}
    return row


def launch_seconds(run: Callable[[], object], launches: int = 31) -> list[float]:
    """Time a call on the GPU: the seconds of each of some launches, by events.

    A gigabyte is overwritten before each one: L2 is then as cold as in a training step, and the CPU has the time to
    queue the launch, so that its own overhead is not measured.
    """
    run()
    flushed = torch.empty(2**30, dtype=torch.int8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(launches)]
    for start, end in events:
        flushed.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [1e-3 * start.elapsed_time(end) for start, end in events]


class _Operands:
    """Draws tensors of bf16 and sets of channels, the same in every run."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device).mul(scale).bfloat16()

    def channels(self, total: int, count: int) -> Tensor:
        return torch.randperm(total, generator=self.generator, device=self.device)[:count].sort().values


def _kept(case: Case) -> tuple[int, int]:
    """Return how many intermediate channels, and how many of the query, are computed of context tokens."""
    kept_kv = kept_count(case.kv_heads * case.head_dim, case.attention_sparsity)
    return kept_count(case.ffn, case.ffn_sparsity), kept_kv * case.heads // case.kv_heads


def _product(
    name: str,
    xs: list[Tensor],
    weights: list[Tensor],
    channels: list[Tensor],
    dim: int,
    formula: str,
    thins: Sequence[Tensor] = (),
    factors: Sequence[Tensor] = (),
) -> KernelCase:
    reads = [0] * len(weights) if len(xs) == 1 else list(range(len(weights)))

    def run(provider: str, dtype: torch.dtype = torch.bfloat16) -> Sequence[Tensor]:
        given_xs, given_weights, *low = ([each.to(dtype) for each in group] for group in (xs, weights, thins, factors))
        dims = [dim] * len(weights)
        return _OPS.fused_linear(  # type: ignore[no-any-return]
            given_xs, given_weights, channels, reads, dims, *low, [], formula, dtype, [], "", provider
        )

    rows, columns = xs[0].shape[0], channels[0].numel() if dim == 0 else weights[0].shape[0]
    frozen, thin = [xs[read].shape[1] for read in reads], [each.shape[1] for each in thins]
    read = sum(x.numel() for x in xs) + sum(columns * depth for depth in frozen) + _elements(thins, factors)
    written = rows * columns * (1 + len(weights) * saves_products(formula))
    return KernelCase(
        name, run, lambda: run("reference", torch.float64), 2.0 * rows * columns * sum(frozen + thin),
        float(BYTES * (read + written)),
    )  # fmt: skip


def _gradients(
    name: str,
    formula: str,
    d_y: Tensor,
    products: list[Tensor],
    thins: Sequence[Tensor] = (),
    factors: Sequence[Tensor] = (),
) -> KernelCase:
    texts = [each.text for each in parsed(formula).gradients(parsed(formula).operands).formulas]

    def run(provider: str, dtype: torch.dtype = torch.bfloat16) -> Sequence[Tensor]:
        d, groups = d_y.to(dtype), [[each.to(dtype) for each in group] for group in (products, thins, factors)]
        return _OPS.fused_linear_gradients(d, *groups, [], ";".join(texts), dtype, provider)  # type: ignore[no-any-return]

    elements = d_y.numel() * (1 + len(texts)) + _elements(products, thins, factors)
    flops = 2.0 * d_y.numel() * sum(each.shape[1] for each in thins)
    return KernelCase(name, run, lambda: run("reference", torch.float64), flops, float(BYTES * elements))


def _elements(*groups: Sequence[Tensor]) -> int:
    return sum(each.numel() for each in itertools.chain(*groups))
