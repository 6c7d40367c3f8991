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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_kernels import kernel_cases, launch_seconds, measure_kernel
from measure import PEERS, arm_model, check_arm, interleaved, paired_ratio, spread, training_step
from roofline import CASES, DEVICES
from rows import append_rows, environment
from workloads import WORKLOADS, Workload, base_model, make_batch

RESULTS = Path(__file__).resolve().parent / "results" / "gpu.jsonl"
PARTS = ("kernels", "steps")


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
                row = measure_kernel(case, ("reference", "triton"), floor, launch_seconds)
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
