"""Measure on an NVIDIA GPU: the generated kernels against the reference, their floor and cuBLAS, then whole steps.

    python benchmarks/gpu.py                                # all of it, both 8B workloads with 8 blocks
    python benchmarks/gpu.py --parts kernels
    python benchmarks/gpu.py --parts steps --workload math10k-8b --layers 32 --arms eager,inductor,o2,triton/o2

`triton/o2` is the preset `o2` with `kernels="triton"`: without it sparse products are `index_select` and cuBLAS. Each
part appends rows to `benchmarks/results/gpu.jsonl`. A kernel that disagrees with the reference fails the run.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import PEERS, arm_model, check_arm, interleaved, paired_ratio, spread, training_step
from roofline import CASES, DEVICES, Case, Device
from rows import append_rows, environment
from torch import Tensor
from torch.utils.benchmark import Timer
from workloads import WORKLOADS, Workload, base_model, make_batch

import sparse_compile.kernels  # noqa: F401 - registers torch.ops.sparselora
from sparse_compile.config import kept_count

RESULTS = Path(__file__).resolve().parent / "results" / "gpu.jsonl"
PARTS = ("kernels", "steps")
TOLERANCE = 2e-2
"""Largest RMS of a bf16 kernel's error, in units of the result's RMS."""


@dataclass(frozen=True)
class KernelCase:
    """A call that one of the generated kernels serves.

    Attributes:
        name: of the kernel.
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


def kernel_cases(case: Case, device: str) -> Iterator[KernelCase]:
    """Yield the products of the context tokens of one sparse block, forward and backward, in bf16."""
    ops = torch.ops.sparselora
    rows, hidden, kept = case.context, case.hidden, kept_count(case.ffn, case.ffn_sparsity)
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).mul(scale).bfloat16()

    def chosen(total: int, count: int) -> Tensor:
        return torch.randperm(total, generator=generator, device=device)[:count].sort().values

    def product_case(
        name: str, xs: list[Tensor], weights: list[Tensor], channels: list[Tensor], dim: int, formula: str
    ) -> KernelCase:
        reads = [0] * len(weights) if len(xs) == 1 else list(range(len(weights)))

        def run(provider: str, wide: bool = False) -> Sequence[Tensor]:
            given = [[each.double() if wide else each for each in group] for group in (xs, weights)]
            dtype = torch.float64 if wide else torch.bfloat16
            dims = [dim] * len(weights)
            return ops.fused_linear(*given, channels, reads, dims, [], [], [], formula, dtype, [], "", provider)  # type: ignore[no-any-return]

        columns = channels[0].numel() if dim == 0 else weights[0].shape[0]
        depths = [xs[read].shape[1] for read in reads]
        results = 1 + len(weights) * (formula not in ("p0", "p0 + p1"))
        elements = sum(x.numel() for x in xs) + sum(columns * depth for depth in depths) + results * rows * columns
        return KernelCase(
            name, run, lambda: run("reference", wide=True), 2.0 * rows * columns * sum(depths), 2.0 * elements
        )

    x, gate, up = drawn(rows, hidden), *(drawn(case.ffn, hidden, scale=hidden**-0.5) for _ in range(2))
    down = drawn(hidden, case.ffn, scale=case.ffn**-0.5)
    ffn = chosen(case.ffn, kept)
    yield product_case("gate, up, activation", [x], [gate, up], [ffn, ffn], 0, "p0*p1*sigmoid(p0)")
    narrow = [drawn(rows, kept) for _ in range(2)]
    yield product_case("gradient of x of gate, up", narrow, [gate.T, up.T], [ffn, ffn], 1, "p0 + p1")
    yield product_case("down", narrow[:1], [down], [ffn], 1, "p0")
    yield product_case("gradient of down", [x], [down.T], [ffn], 0, "p0")
    kept_q = kept_count(case.kv_heads * case.head_dim, case.attention_sparsity) * case.heads // case.kv_heads
    square = drawn(hidden, hidden, scale=hidden**-0.5)
    heads = chosen(hidden, kept_q)
    yield product_case("query", [x], [square], [heads], 0, "p0")
    yield product_case("output projection", [drawn(rows, kept_q)], [square], [heads], 1, "p0")

    def gradients(provider: str, wide: bool = False) -> Sequence[Tensor]:
        d_y, *products = [each.double() for each in (x[:, :kept], *narrow)] if wide else (x[:, :kept], *narrow)
        texts = "p1*sigmoid(p0)*(1 + p0*(1 - sigmoid(p0)));p0*sigmoid(p0)"
        dtype = torch.float64 if wide else torch.bfloat16
        return ops.fused_linear_gradients(d_y, products, [], [], [], texts, dtype, provider)  # type: ignore[no-any-return]

    yield KernelCase(
        "activation backward", gradients, lambda: gradients("reference", wide=True), 0.0, 10.0 * rows * kept
    )


def measure_kernel(case: KernelCase, providers: Sequence[str], device: Device) -> dict[str, Any]:
    """Return the error and the seconds of each provider, beside the floor.

    Raises:
        AssertionError: a provider's result is off.
    """
    expected = case.expected()[0]
    scale = expected.square().mean().sqrt()
    row: dict[str, Any] = {"kernel": case.name, "floor": case.floor(device), "floor_of": device.name}
    for provider in providers:
        error = float((case.run(provider)[0].double() - expected).square().mean().sqrt() / scale)
        assert error < TOLERANCE, f"{case.name} by {provider}: error {error:.3g} of the RMS"
        timer = Timer("run(provider)", globals={"run": case.run, "provider": provider})
        row[provider] = {"error": error, "seconds": timer.blocked_autorange(min_run_time=0.2).median}
    return row


def measure_steps(workload: Workload, arms: Sequence[str], device: str, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each arm: a training step in turns with the others, peak memory, first call."""
    with torch.device(device):
        base = base_model(workload)
    batch = {name: each.to(device) for name, each in make_batch(workload).items()}
    with torch.device(device):
        steps = {arm: training_step(arm_model(base, workload, arm), batch) for arm in arms}
    with tempfile.TemporaryDirectory() as caches:
        times = interleaved(steps, Path(caches), rounds, warm_up=2)
    rows = []
    for arm, step in steps.items():
        peak = None
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            step()
            peak = torch.cuda.max_memory_allocated()
        own = times[arm]
        ratios = {peer: paired_ratio(times[peer].steps, own.steps) for peer in PEERS if peer in times and peer != arm}
        rows.append(
            {
                "workload": dataclasses.asdict(workload),
                "label": workload.label,
                "arm": arm,
                "step_seconds": dataclasses.asdict(spread(own.steps)),
                "ratios": {peer: dataclasses.asdict(ratio) for peer, ratio in ratios.items()},
                "first_call_seconds": own.first_call,
                "first_loss": own.loss,
                "peak_bytes": peak,
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"comma list of {', '.join(PARTS)}")
    parser.add_argument("--workload", default="math10k-8b,csr-8b", help="comma list of the 8B workloads")
    parser.add_argument("--layers", type=int, default=8, help="blocks of the model (an 8B Llama has 32)")
    parser.add_argument(
        "--arms", help="comma list; default: eager, inductor, exact, the workload's preset, with triton"
    )
    parser.add_argument("--steps", type=int, default=10, help="measured rounds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of rows to append to")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("no CUDA device: nothing is measured", file=sys.stderr)
        return 1
    parts, names = set(args.parts.split(",")), args.workload.split(",")
    if not parts <= set(PARTS) or not set(names) <= set(CASES):
        parser.error(f"parts are {', '.join(PARTS)}, workloads {', '.join(CASES)}")
    surroundings = environment("gpu.py", sys.argv[1:])
    surroundings["machine"]["gpu"] = torch.cuda.get_device_name()
    floor = next((each for each in DEVICES if each.name in surroundings["machine"]["gpu"]), DEVICES[0])
    for name in names:
        if "kernels" in parts:
            for case in kernel_cases(CASES[name], "cuda"):
                row = measure_kernel(case, ("reference", "triton"), floor)
                append_rows([row | {"workload": name} | surroundings], args.out)
                triton, composed = (1e6 * row[provider]["seconds"] for provider in ("triton", "reference"))
                print(
                    f"{name}, {case.name}: floor {1e6 * row['floor']:.0f} us ({floor.name}), "
                    f"triton {triton:.0f} us, composed {composed:.0f} us",
                    flush=True,
                )
        if "steps" in parts:
            workload = dataclasses.replace(WORKLOADS[name], layers=args.layers)
            default = [*PEERS, "exact", workload.preset, f"triton/{workload.preset}"]
            arms = args.arms.split(",") if args.arms else default
            for arm in arms:
                check_arm(arm)
            for row in measure_steps(workload, arms, "cuda", args.steps):
                append_rows([row | surroundings], args.out)
                ratios = ", ".join(f"{each['median']:.2f}x {peer}" for peer, each in row["ratios"].items())
                print(
                    f"{row['label']}, {row['arm']}: {1e3 * row['step_seconds']['median']:.1f} ms; {ratios}", flush=True
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
