"""Time LoRA training steps on a CPU: PEFT in eager mode, PEFT compiled by Inductor, and this backend.

    python benchmarks/cpu.py --quick                        # under two minutes on two cores, to see that all works
    python benchmarks/cpu.py --workload math10k-mini        # a result
    python benchmarks/cpu.py --arms inductor,o2 --layers 4 --hidden 2048 --ffn 8192 --heads 32 --kv-heads 8
    python benchmarks/cpu.py --workload csr-mini --arms inductor,exact,exact:select_loss_rows,o1,o1:
    python benchmarks/cpu.py --arms eager,inductor,dora/eager,dora/exact --layers 2        # DoRA against LoRA
    python benchmarks/cpu.py --memory --profile 15          # also peak memory, warm caches, and where the time goes
    python benchmarks/cpu.py --memory --checkpointing       # the same with activation checkpointing in all arms

All arms live in one process on one copy of the frozen weights and step in turns (A B C A B C ...); ratios are taken
within a round. Predictors and channel selection are part of a step, compilation is not. Each arm appends a row to
`benchmarks/results/<workload>.jsonl`; `benchmarks/plot.py` draws them.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from measure import (
    DENSE,
    DORA,
    PEERS,
    Alone,
    Flops,
    arm_model,
    check_arm,
    counted_flops,
    interleaved,
    measure_alone,
    rewritten_flops,
)
from rows import Row, append_rows, environment, table
from workloads import DTYPES, QUICK_SIZES, WORKLOADS, Workload, base_model, make_batch

from sparse_compile.cli.paired import ArmTimes, Step, paired_ratio, spread, training_step

RESULTS = Path(__file__).resolve().parent / "results"
SIZES = tuple(f.name for f in dataclasses.fields(Workload) if f.type == "int")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        workloads = [_workload(name, args) for name in args.workload.split(",")]
        choices = [_arms(args.arms, workload) for workload in workloads]
    except ValueError as error:
        parser.error(str(error))
    if args.threads:
        torch.set_num_threads(args.threads)
    for workload, arms in zip(workloads, choices, strict=True):
        rows = run(workload, arms, args)
        print(f"\n{workload.label}\n\n{table(rows)}\n", flush=True)
        append_rows(
            [row.to_dict() for row in rows],
            args.out or RESULTS / ("quick.jsonl" if args.quick else f"{workload.name}.jsonl"),
        )
    return 0


def run(workload: Workload, arms: Sequence[str], args: argparse.Namespace) -> list[Row]:
    """Measure one workload; return a row for each arm."""
    surroundings = environment("cpu.py", sys.argv[1:])
    machine = surroundings["machine"]
    if machine["load"] > machine["cores"] / 2:
        print(f"a busy machine (load {machine['load']:.1f} on {machine['cores']} cores): no result", file=sys.stderr)
    alone: dict[str, Alone] = {}
    if args.memory:
        # Before anything is built here, so that two models never compete for memory.
        for arm in arms:
            print(f"{workload.label}: {arm} alone", flush=True)
            alone[arm] = measure_alone(workload, arm, torch.get_num_threads())
    base = base_model(workload)
    batch = make_batch(workload)
    steps = {arm: training_step(arm_model(base, workload, arm), batch) for arm in arms}
    print(f"{workload.label}: {', '.join(arms)} in turns", flush=True)
    with tempfile.TemporaryDirectory() as caches:
        times = interleaved(steps, Path(caches), args.steps, args.warm_up)
    if args.profile:
        for arm, step in steps.items():
            print(f"\n{arm}\n{_profile(step, args.profile)}", flush=True)
    counted = counted_flops(workload)
    # The limit is that of a sparse LoRA step. A recomputed forward is work that `explain` does not count.
    rewritten = [arm for arm in arms if arm not in PEERS and not arm.startswith((DENSE, DORA))]
    planned = [] if workload.checkpointing else rewritten
    flops = {arm: rewritten_flops(base, workload, arm) for arm in planned}
    return [
        _row(workload, arm, times, flops.get(arm), alone.get(arm), counted=dataclasses.asdict(counted), **surroundings)
        for arm in arms
    ]


def _row(
    workload: Workload,
    arm: str,
    times: Mapping[str, ArmTimes],
    flops: Flops | None,
    alone: Alone | None,
    **surroundings: object,
) -> Row:
    own = times[arm]
    ratios = {peer: paired_ratio(times[peer].steps, own.steps) for peer in PEERS if peer in times and peer != arm}
    measured = ratios.get("inductor")
    return Row(
        workload=workload,
        label=workload.label,
        arm=arm,
        rounds=len(own.steps),
        step_seconds=spread(own.steps),
        ratios=ratios,
        first_call_seconds=own.first_call,
        first_loss=own.loss,
        graphs=own.graphs,
        flops=flops,
        flops_limit=flops and flops.limit,
        flops_limit_weights=flops and flops.weights_limit,
        efficiency=measured.median / flops.limit if measured and flops else None,
        alone=alone,
        **surroundings,  # type: ignore[arg-type]
    )


def _profile(step: Step, most: int) -> str:
    """Profile one step; return the operations that took most time of their own."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    return str(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=most, max_name_column_width=80))


def _workload(name: str, args: argparse.Namespace) -> Workload:
    if name not in WORKLOADS:
        raise ValueError(f"no workload {name!r}; there are {', '.join(WORKLOADS)}")
    sizes = dict(QUICK_SIZES) if args.quick else {}
    sizes.update({size: getattr(args, size) for size in SIZES if getattr(args, size) is not None})
    return dataclasses.replace(WORKLOADS[name], dtype=args.dtype, checkpointing=args.checkpointing, **sizes)


def _arms(given: str | None, workload: Workload) -> list[str]:
    arms = list(dict.fromkeys(given.split(","))) if given else [*PEERS, workload.preset]
    for arm in arms:
        check_arm(arm)
    return arms


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", default="math10k-mini", help=f"comma list of {', '.join(WORKLOADS)}")
    parser.add_argument(
        "--arms",
        help="comma list of eager, inductor, presets, presets with some optimising passes alone (`o2:` with none, "
        "`exact:select_loss_rows` with one), a preset and the depth at which context leaves (`auto@0.5`), each of them "
        "with DoRA adapters (`dora/exact`), and the dense steps of a sparse run (`dense/o2`); default: eager, inductor "
        "and the workload's preset",
    )
    parser.add_argument("--steps", type=_positive, default=10, help="measured rounds")
    parser.add_argument("--warm-up", type=int, default=2, help="rounds between the first calls and the measured ones")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="of the frozen weights")
    parser.add_argument(
        "--checkpointing", action="store_true", help="recompute each block in the backward, in all arms"
    )
    parser.add_argument("--threads", type=_positive, help="threads of torch; default: its own choice")
    parser.add_argument("--quick", action="store_true", help="small sizes, for a look rather than a result")
    parser.add_argument(
        "--memory",
        action="store_true",
        help="also run each arm alone, in two fresh processes: peak memory, first call with cold and with warm caches",
    )
    parser.add_argument("--profile", type=_positive, metavar="N", help="print the N operations that take most time")
    parser.add_argument("--out", type=Path, help="file of rows to append to; default: below benchmarks/results")
    sizes = parser.add_argument_group("sizes, instead of the workload's own")
    for size in SIZES:
        sizes.add_argument(f"--{size.replace('_', '-')}", type=_positive)
    return parser


if __name__ == "__main__":
    sys.exit(main())
