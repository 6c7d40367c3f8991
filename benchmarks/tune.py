"""Time the candidate tiles of each generated kernel on this GPU and write the fastest to `kernels/configs/<arch>.json`.

    python benchmarks/tune.py                               # both 8B workloads
    python benchmarks/tune.py --workload csr-8b --out table.json

A candidate is compiled ahead of time first: what spills registers or exceeds shared memory is dropped. What is left
must agree with the reference in fp64, and is then timed launch by launch, as a training step launches it. The fastest
by its median replaces the tile that is chosen without a table only where it saves 2% or more. Nothing but this program
times anything: a training step reads the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_kernels import TOLERANCE, Clock, KernelCase, compiled_variants, kernel_cases, launch_seconds
from kernels_report import Built, Variant, build
from roofline import CASES
from rows import environment

from sparse_compile.kernels.fused_linear import tuned
from sparse_compile.kernels.fused_linear.tiles import Problem, Tile, architecture, choose_tile, shared_limit
from sparse_compile.kernels.fused_linear.tuned import Entry, TunedTable, bucket

GAIN = 0.02
"""What a tile must save to replace the one that is chosen without a table: less is within the noise of a clock."""

Report = Callable[[str], object]
Over = Callable[..., Iterable[Built]]


@dataclass(frozen=True)
class Member:
    """A kernel of one workload.

    Attributes:
        label: for people.
        case: what is run.
        variant: what is compiled ahead of time.
    """

    label: str
    case: KernelCase
    variant: Variant


def candidates(problem: Problem) -> list[Tile]:
    """Return the tiles that are worth a try, that which is chosen without a table first.

    None is larger than the problem, or has more in flight than shared memory. Each holds 32 to 128 sums a thread: with
    fewer the matrix units wait for operands, with more registers spill.
    """
    untuned = choose_tile(problem)
    if problem.kernel == "gradients":
        sizes, depths = itertools.product((16, 32, 64), (32, 64, 128, 256)), [(untuned.k, untuned.stages)]
        fewest = 8
    else:
        sizes, depths = itertools.product((64, 128, 256), repeat=2), [(32, untuned.stages)]
        depths += [(64, stages) for stages in (untuned.stages - 1, untuned.stages) if stages > 1]
        fewest = 32
    found = [untuned]
    for (m, n), (k, stages), warps in itertools.product(sizes, depths, (4, 8)):
        tile = dataclasses.replace(untuned, m=m, n=n, k=k, warps=warps, stages=stages)
        covers = m < 2 * max(16, problem.rows) and n < 2 * max(16, problem.columns)
        fits = problem.kernel == "gradients" or tile.shared_bytes <= shared_limit(problem.capability)
        if covers and fits and fewest <= m * n * problem.products // (32 * warps) <= 128 and tile not in found:
            found.append(tile)
    return found


def compilable(
    variant: Variant, tiles: Sequence[Tile], arch: str, report: Report = print, over: Over = map
) -> list[Tile]:
    """Return the tiles with which a kernel compiles without a spill and within shared memory, ahead of time.

    Args:
        variant: the kernel.
        tiles: to be tried.
        arch: as the compiler calls it.
        report: is told what is dropped.
        over: maps a function over the tiles, in order; that of an executor compiles several at once.
    """
    kept = []
    limit = shared_limit(variant.problem.capability)
    for tile, built in zip(tiles, over(partial(build, variant, arch), tiles), strict=True):
        if built.spills or built.shared > limit:
            report(f"  dropped {_named(tile)}: {built.spills} bytes spilled, {built.shared} of {limit} shared")
        else:
            kept.append(tile)
    return kept


def launched_problem(case: KernelCase) -> Problem:
    """Run a case once and return the problem of its launch."""
    problems: list[Problem] = []

    def note(problem: Problem) -> Tile:
        problems.append(problem)
        return choose_tile(problem)

    with tuned.choosing(note):
        case.run("triton")
    (problem,) = problems
    return problem


def timed(case: KernelCase, tile: Tile, clock: Clock, report: Report = print) -> list[float]:
    """Return the seconds of launches with a tile; none where the device cannot launch it, or the result is wrong."""
    from triton.runtime.errors import OutOfResources

    def chosen(problem: Problem) -> Tile:
        return dataclasses.replace(tile, pack=tuned.packs(problem, tile.m))

    with tuned.choosing(chosen):
        try:
            error = case.error("triton")
        except OutOfResources as reason:
            report(f"  dropped {_named(tile)}: {reason}")
            return []
        if not error < TOLERANCE:
            report(f"  dropped {_named(tile)}: {case.name} is wrong with it, by {error:.3g} of the RMS")
            return []
        return clock(lambda: case.run("triton"))


def fastest(seconds: Mapping[Tile, float], untuned: Tile) -> Tile:
    """Return the tile of the least seconds; the one that is chosen without a table unless another saves `GAIN`."""
    best = min(seconds, key=lambda tile: seconds[tile])
    if untuned in seconds and seconds[best] > (1 - GAIN) * seconds[untuned]:
        return untuned
    return best


def tune(
    problem: Problem, members: Sequence[Member], arch: str, clock: Clock, report: Report = print, over: Over = map
) -> Entry:
    """Time the candidates of one problem and return the fastest.

    Args:
        problem: a bucket.
        members: the kernels that have it; they share a tile, so their medians are added up.
        arch: of the device, as the compiler calls it.
        clock: times a launch.
        report: is told what is dropped, and what was found.
        over: see `compilable`.
    """
    tiles = candidates(problem)
    untuned = tiles[0]
    for member in members:
        tiles = compilable(member.variant, tiles, arch, report, over)
    seconds: dict[Tile, float] = {}
    for tile in tiles:
        times = [timed(member.case, tile, clock, report) for member in members]
        if all(times):
            seconds[tile] = sum(statistics.median(each) for each in times)
    if untuned not in seconds:
        raise RuntimeError(f"{members[0].label}: the tile that is chosen without a table, {_named(untuned)}, fails")
    best = fastest(seconds, untuned)
    names = ", ".join(member.label for member in members)
    report(
        f"{names}: {_named(best)}, {1e6 * seconds[best]:.1f} us "
        f"({_named(untuned)}: {1e6 * seconds[untuned]:.1f} us; {len(seconds)} timed)"
    )
    return Entry(problem, dataclasses.replace(best, pack=False), seconds[best], seconds[untuned])


def members_of(names: Sequence[str], device: str) -> dict[Problem, list[Member]]:
    """Return the kernels of some workloads by the problem that the table knows them by."""
    grouped: dict[Problem, list[Member]] = {}
    for name in names:
        compiled = compiled_variants(CASES[name])
        for case in kernel_cases(CASES[name], device):
            problem = launched_problem(case)
            variant = dataclasses.replace(
                compiled[case.name],
                problem=dataclasses.replace(compiled[case.name].problem, capability=problem.capability),
            )
            grouped.setdefault(bucket(problem), []).append(Member(f"{case.name} ({name})", case, variant))
    return grouped


def provenance(arguments: Sequence[str]) -> dict[str, Any]:
    """Return what a table says about where it comes from."""
    import triton

    found = environment("tune.py", arguments)
    versions = {**found["versions"], "triton": triton.__version__, "cuda": torch.version.cuda}
    device = torch.cuda.get_device_name()
    return {"device": device, "versions": versions, **{name: found[name] for name in ("date", "commit", "command")}}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=sorted(CASES), action="append", help="default: both")
    parser.add_argument("--out", type=Path, help="default: the table that the kernels read")
    arguments = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available() or torch.version.hip is not None:
        print("no CUDA device: nothing is measured, and no table is written", file=sys.stderr)
        return 1
    capability = torch.cuda.get_device_capability()
    out = args.out or tuned.table_path(capability)
    origin = provenance(arguments)
    grouped = members_of(args.workload or list(CASES), "cuda")
    arch = architecture(capability)
    # Spawned: a process with a CUDA context cannot be forked.
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        entries = [tune(problem, members, arch, launch_seconds, over=pool.map) for problem, members in grouped.items()]
    tuned.write_table(TunedTable(capability, origin, tuple(entries), tuned.sources_hash()), out)
    print(f"{len(entries)} entries written to {out}")
    return 0


def _named(tile: Tile) -> str:
    return f"{tile.m} x {tile.n} x {tile.k}, {tile.warps} warps, {tile.stages} stages"


if __name__ == "__main__":
    sys.exit(main())
