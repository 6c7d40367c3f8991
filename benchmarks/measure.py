"""Measure training steps of several arms in one process, taken in turns, and one arm alone in a fresh process."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from liger import LIGER, with_liger
from torch import nn
from workloads import Workload, adapted_model, base_model, make_batch

from sparse_compile.cli.paired import ArmTimes, Step, empty_caches, take_turns, training_step

PRESETS = ("none", "exact", "auto", "o1", "o2")
PEERS = ("eager", "inductor")
DORA = "dora/"
"""What an arm begins with whose adapters are DoRA's: `dora/exact` beside `inductor`, which has LoRA's."""

TRITON = "triton/"
"""What an arm begins with whose sparse products are computed by generated kernels."""

DENSE = "dense/"
"""What an arm begins with whose schedule stays in its dense phase: `dense/o2` runs the graph of `o2`, densely."""

_NEVER = 1_000_000_000


def options_of(arm: str) -> dict[str, Any]:
    """Return the options of an arm: a preset, or `PRESET:PASSES` with those optimising passes alone.

    `exact:select_loss_rows+fuse_adapters` has two of them, `o2:` none: sparsity by itself. `triton/o2` asks for the
    generated kernels, `dense/o2` never begins to be sparse, in `auto@0.5` context tokens leave at half of the depth.

    Raises:
        ValueError: no such preset or pass, or a depth that is none.
    """
    from sparse_compile.compiler.pipeline import PASSES

    preset, colon, listed = arm.removeprefix(TRITON).removeprefix(DENSE).partition(":")
    preset, _, depth = preset.partition("@")
    chosen = [name for name in listed.split("+") if name]
    optional = [each.name for each in PASSES if each.optimises]
    if preset not in PRESETS or not set(chosen) <= set(optional):
        raise ValueError(
            f"no arm {arm!r}; there are {', '.join((*PEERS, *PRESETS))}, and a preset with some passes alone, such as "
            f"{PRESETS[-1]}:{'+'.join(optional)}"
        )
    left_out = [name for name in optional if name not in chosen] if colon else []
    kernels = "triton" if arm.startswith(TRITON) else "measured"
    start = _NEVER if arm.startswith(DENSE) else 0
    options = {"preset": preset, "disable": left_out, "start_step": start, "kernels": kernels}
    return {**options, "context_exit": float(depth)} if depth else options


def check_arm(arm: str) -> None:
    """Raise `ValueError` for an arm that there is not."""
    if arm != LIGER and arm.removeprefix(DORA) not in PEERS:
        options_of(arm.removeprefix(DORA))


def arm_model(base: nn.Module, workload: Workload, arm: str) -> nn.Module:
    """Return a model with adapters, compiled as the arm of that name; sparse from the first step on, or never."""
    model = adapted_model(base, workload, dora=arm.startswith(DORA))
    name = arm.removeprefix(DORA)
    if name == LIGER:
        return with_liger(model)
    if name == "inductor":
        model.compile(backend="inductor")
    elif name != "eager":
        model.compile(backend="sparselora", options=options_of(name))
    return model


def interleaved(
    steps: Mapping[str, Step],
    caches: Path,
    rounds: int,
    warm_up: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, ArmTimes]:
    """Time the arms in turns, as `take_turns` does, of which those that run eagerly are known by their names."""
    eager = [name for name in steps if name.removeprefix(DORA) in ("eager", LIGER)]
    return take_turns(steps, caches, rounds, warm_up, eager=eager, clock=clock)


@dataclass(frozen=True)
class Alone:
    """One arm in two fresh processes, one after the other, which share caches that start empty.

    Attributes:
        first_call_cold: seconds of the first step, with empty caches and the compiler to be loaded.
        first_call_warm: the same in the second process.
        peak_bytes: most memory resident while the second process took warm steps, frozen weights included.
        peak_bytes_compiling: most memory resident at any time in the first process.
        step_bytes: most bytes of tensors that a step had at once, beside those that live longer (weights, adapters and
            their optimizer's state).
    """

    first_call_cold: float
    first_call_warm: float
    peak_bytes: int
    peak_bytes_compiling: int
    step_bytes: int


def measure_alone(workload: Workload, arm: str, threads: int) -> Alone:
    """Measure one arm in processes of its own."""
    # Spawned, not forked: a fork would start with the memory of this process.
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        for _ in range(2):
            with ProcessPoolExecutor(1, mp_context=context) as executor:
                runs.append(executor.submit(_alone, workload, arm, threads, Path(folder)).result())
    (cold, compiling, _, _), (warm, _, peak, tensors) = runs
    return Alone(cold, warm, peak, compiling, tensors)


def _alone(workload: Workload, arm: str, threads: int, caches: Path) -> tuple[float, int, int, int]:
    """Return the seconds of the first call, the peaks of memory up to its end and after it, and a step's tensors."""
    torch.set_num_threads(threads)
    model = arm_model(base_model(workload), workload, arm)
    step = training_step(model, make_batch(workload))
    with empty_caches(caches):
        start = time.perf_counter()
        step()
        first = time.perf_counter() - start
        whole = peak_bytes()
        gc.collect()
        forget_peak()
        for _ in range(3):
            step()
        return first, whole, peak_bytes(), step_bytes(step)


def step_bytes(step: Step) -> int:
    """Return the most bytes that PyTorch's allocator had given out in a step at once, beyond those at its start.

    Unlike what is resident, this holds neither what a compiler left behind nor what `malloc` keeps for later.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(held, default=0)


def peak_bytes() -> int:
    """Return the most memory that was resident in this process, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not `ru_maxrss` on Linux: a child inherits that of the process it was started from.
        (line,) = (line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def forget_peak() -> None:
    """Start the peak anew from what is resident now; only Linux can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


@dataclass(frozen=True)
class Flops:
    """FLOPs of one training step before and after the rewrites; their ratio is the limit of the gain in time.

    Attributes:
        before, after: all matrix products, causal attention by the half that is executed, predictors included.
        weights_before, weights_after: the products with frozen weights alone.
        sites, sparse_sites: feed-forward and attention blocks found, and those computed sparsely.
    """

    before: float
    after: float
    weights_before: float
    weights_after: float
    sites: int
    sparse_sites: int

    @property
    def limit(self) -> float:
        """How many times less work the rewritten step is."""
        return self.before / self.after

    @property
    def weights_limit(self) -> float:
        """The same for the products with frozen weights alone."""
        return self.weights_before / self.weights_after


def rewritten_flops(base: nn.Module, workload: Workload, arm: str) -> Flops:
    """Ask `sparse_compile.explain` for the work of a step, without taking one."""
    import sparse_compile

    model = adapted_model(base, workload)
    report = sparse_compile.explain(model, config=options_of(arm), **make_batch(workload))
    return Flops(
        before=report.flops_before,
        after=report.flops_after,
        weights_before=sum(graph.weight_flops_before for graph in report.graphs),
        weights_after=sum(graph.weight_flops_after for graph in report.graphs),
        sites=len(report.sites),
        sparse_sites=sum(site.sparse for site in report.sites),
    )


@dataclass(frozen=True)
class CountedFlops:
    """FLOPs of one dense step as `torch.utils.flop_counter` sees them on the eager model.

    Attributes:
        linear: products of linear layers.
        attention: products inside attention, all S x S scores.
    """

    linear: int
    attention: int


def counted_flops(workload: Workload) -> CountedFlops:
    """Count an eager step on a model without weights: a second opinion on what `explain` says."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model, batch = adapted_model(base_model(workload), workload), make_batch(workload)
    # Stand-ins, because transformers looks into its masks unless it is traced. And the counter knows the products that
    # attention is made of, but no fused attention of a CPU.
    stand_ins = FakeTensorMode(allow_non_fake_inputs=True)
    with stand_ins, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    counts = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    attention = sum(count for op, count in counts.items() if "bmm" in op)
    total = counter.get_total_flops()
    assert math.isclose(total, sum(counts.values()))
    return CountedFlops(linear=total - attention, attention=attention)
