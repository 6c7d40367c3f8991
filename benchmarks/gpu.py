"""Measure on an NVIDIA GPU: the generated kernels against the reference, their floor and cuBLAS, then whole steps.

    python benchmarks/gpu.py                                # all of it, both 8B workloads with 8 blocks
    python benchmarks/gpu.py --parts kernels
    python benchmarks/gpu.py --parts steps --workload math10k-8b --layers 32 --arms eager,inductor,o2,triton/o2

`triton/o2` is the preset `o2` with `kernels="triton"`: without it sparse products are `index_select` and cuBLAS. Each
part appends rows to `benchmarks/results/gpu.jsonl`; in the end all of them are drawn into `gpu.svg` beside it. What
fails, or disagrees with the reference, is named, the rest is measured all the same, and the exit status is 1. `liger`
is Liger-Kernel, where it is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_kernels import kernel_cases, launch_seconds, measure_kernel
from gpu_plot import draw
from liger import LIGER, liger_missing
from measure import PEERS, arm_model, check_arm, interleaved
from roofline import CASES, DEVICES
from rows import append_rows, environment, read_rows
from torch.autograd import DeviceType
from workloads import WORKLOADS, Workload, base_model, make_batch

from sparse_compile.cli.paired import Step, paired_ratio, spread, training_step

RESULTS = Path(__file__).resolve().parent / "results" / "gpu.jsonl"
PARTS = ("kernels", "steps")


PREDICTOR_OPS = (
    "context_mean", "spaced_rows", "low_rank_product", "predicted_norms", "predicted_scores", "top_channels",
)  # fmt: skip
"""The ops that predict and choose channels; what Inductor fuses behind a feed-forward block's thin products is not."""


class ArmError(Exception):
    """Carries the name of the arm whose step failed."""


def measure_steps(workload: Workload, arms: Sequence[str], device: str, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each arm: a training step in turns with the others, peak memory, first call.

    The row of an arm that fails, or that is not installed, says so, and the others are measured without it.
    """
    about = {"workload": dataclasses.asdict(workload), "label": workload.label}
    missing = liger_missing()
    if LIGER in arms and missing:
        others = [arm for arm in arms if arm != LIGER]
        return [about | {"arm": LIGER, "error": missing}, *measure_steps(workload, others, device, rounds)]
    try:
        return [about | row for row in _measured(workload, arms, device, rounds)] if arms else []
    except ArmError as failure:
        # The text alone: a traceback would keep the tensors of the step.
        failed, reason = str(failure), f"{type(failure.__cause__).__name__}: {failure.__cause__}"[:2000]
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    others = [arm for arm in arms if arm != failed]
    return [about | {"arm": failed, "error": reason}, *measure_steps(workload, others, device, rounds)]


def _measured(workload: Workload, arms: Sequence[str], device: str, rounds: int) -> list[dict[str, Any]]:
    with torch.device(device):
        base = base_model(workload)
    batch = {name: each.to(device) for name, each in make_batch(workload).items()}
    steps = {}
    for arm in arms:
        with _named(arm), torch.device(device):
            steps[arm] = _named(arm)(training_step(arm_model(base, workload, arm), batch))
    with tempfile.TemporaryDirectory() as caches:
        times = interleaved(steps, Path(caches), rounds, warm_up=2)
    rows = []
    for arm, step in steps.items():
        peak = at_start = None
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            at_start = torch.cuda.memory_allocated()
            step()
            peak = torch.cuda.max_memory_allocated()
        own = times[arm]
        peers = [peer for peer in (*PEERS, LIGER) if peer in times and peer != arm]
        ratios = {peer: paired_ratio(times[peer].steps, own.steps) for peer in peers}
        rows.append(
            {
                "arm": arm,
                "step_seconds": dataclasses.asdict(spread(own.steps)),
                "ratios": {peer: dataclasses.asdict(ratio) for peer, ratio in ratios.items()},
                "first_call_seconds": own.first_call,
                "first_loss": own.loss,
                "peak_bytes": peak,
                "step_bytes": None if peak is None or at_start is None else peak - at_start,
                "predictor_share": predictor_share(step),
            }
        )
    return rows


def predictor_share(step: Step) -> float | None:
    """Return which part of a step's time on the device, or without a GPU on the CPU, `PREDICTOR_OPS` take.

    None where the profiler saw nothing, as without access to the GPU's counters.
    """
    on_gpu = torch.cuda.is_available()
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if on_gpu else []
    with torch.profiler.profile(activities=activities) as profile:
        step()
    events = profile.key_averages()
    names = {f"sparselora::{name}" for name in PREDICTOR_OPS}
    ops = [event for event in events if event.device_type == DeviceType.CPU]
    own = sum(event.device_time_total if on_gpu else event.cpu_time_total for event in ops if event.key in names)
    if not on_gpu:
        return float(own / sum(event.self_cpu_time_total for event in ops))
    # Ranges that code names appear on the device as well, above the kernels that they hold.
    kernels = (each for each in events if each.device_type == DeviceType.CUDA and not each.is_user_annotation)
    total = sum(kernel.self_device_time_total for kernel in kernels)
    return float(own / total) if total else None


@contextlib.contextmanager
def _named(arm: str) -> Iterator[None]:
    """Name the arm whose building, or as a decorator whose step, fails."""
    try:
        yield
    except Exception as error:
        raise ArmError(arm) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"comma list of {', '.join(PARTS)}")
    parser.add_argument("--workload", default="math10k-8b,csr-8b", help="comma list of the 8B workloads")
    parser.add_argument("--layers", type=int, default=8, help="blocks of the model (an 8B Llama has 32)")
    parser.add_argument(
        "--arms", help="comma list; default: eager, inductor, liger, exact, the workload's preset, with triton"
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
    complete = True
    for name in names:
        if "kernels" in parts:
            complete &= _measure_kernels(name, surroundings, args.out)
        if "steps" in parts:
            complete &= _measure_steps(name, args, surroundings)
    _redraw(args.out)
    return int(not complete)


def _measure_kernels(name: str, surroundings: dict[str, Any], out: Path) -> bool:
    """Measure, print and append every kernel of a workload; return whether all were measured."""
    floor = next((each for each in DEVICES if each.name in surroundings["machine"]["gpu"]), DEVICES[0])
    complete = True
    for case in kernel_cases(CASES[name], "cuda"):
        try:
            row = measure_kernel(case, ("reference", "triton"), floor, launch_seconds)
        except Exception as error:  # whatever a compiler or a driver raises: the others are still measured
            complete = False
            print(f"FAILED {name}, {case.name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            continue
        append_rows([row | {"workload": name} | surroundings], out)
        triton, composed = (1e6 * row[provider]["seconds"] for provider in ("triton", "reference"))
        print(
            f"{name}, {case.name}: floor {1e6 * row['floor']:.0f} us ({floor.name}), "
            f"triton {triton:.0f} us, composed {composed:.0f} us",
            flush=True,
        )
    return complete


def _measure_steps(name: str, args: argparse.Namespace, surroundings: dict[str, Any]) -> bool:
    """Measure, print and append the training steps of a workload; return whether all were measured."""
    workload = dataclasses.replace(WORKLOADS[name], layers=args.layers)
    default = [*PEERS, LIGER, "exact", workload.preset, f"triton/{workload.preset}"]
    arms = args.arms.split(",") if args.arms else default
    for arm in arms:
        check_arm(arm)
    try:
        measured = measure_steps(workload, arms, "cuda", args.steps)
    except Exception as error:
        print(f"FAILED {name}, steps: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return False
    complete = True
    for row in measured:
        append_rows([row | surroundings], args.out)
        if "error" in row:
            complete &= row["error"] == liger_missing()
            print(f"{row['label']}, {row['arm']}: {row['error']}", flush=True)
            continue
        ratios = ", ".join(f"{each['median']:.2f}x {peer}" for peer, each in row["ratios"].items())
        share = "" if row["predictor_share"] is None else f"; predictor {row['predictor_share']:.1%}"
        print(
            f"{row['label']}, {row['arm']}: {1e3 * row['step_seconds']['median']:.1f} ms; {ratios}; "
            f"first call {row['first_call_seconds']:.0f} s, peak {row['peak_bytes'] / 2**30:.1f} GiB{share}",
            flush=True,
        )
    return complete


def _redraw(rows: Path) -> None:
    """Draw all rows that there are, into a file beside them."""
    try:
        draw(read_rows([rows]), rows.with_suffix(".svg"))
    except (OSError, ValueError) as error:
        print(f"nothing is drawn: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
