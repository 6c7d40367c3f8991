"""Time training steps of several arms in turns, so that what else the machine does falls out of their ratios."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sparse_compile.torch_private.dynamo import compiled_graphs
from sparse_compile.torch_private.inductor import forget_compiled

__all__ = [
    "ArmTimes",
    "Spread",
    "Step",
    "empty_caches",
    "load_compiler",
    "paired_ratio",
    "spread",
    "take_turns",
    "training_step",
]

Step = Callable[[], float]
"""Takes one training step and returns the loss."""


@dataclass(frozen=True)
class Spread:
    """The middle of some figures, and the quantiles that a fifth of them stays below and a fifth exceeds."""

    median: float
    p20: float
    p80: float


def spread(values: Sequence[float]) -> Spread:
    """Return median and quantiles; between two values, by linear interpolation."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    p20, *_, p80 = statistics.quantiles(values, n=5, method="inclusive")
    return Spread(statistics.median(values), p20, p80)


def paired_ratio(peer: Sequence[float], arm: Sequence[float]) -> Spread:
    """Return how many times faster than its peer an arm is, from the ratios within each round.

    What else the machine did in a round it did to both, so that it falls out of their ratio.
    """
    return spread([p / a for p, a in zip(peer, arm, strict=True)])


def training_step(model: nn.Module, *batches: Mapping[str, Tensor]) -> Step:
    """Return what takes one step: forward, backward, AdamW on the adapters, gradients dropped.

    Args:
        model: what computes its own loss.
        *batches: what is passed to it, one after the other, over and over.
    """
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    turns = itertools.cycle(batches)

    def step() -> float:
        loss = model(**next(turns)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())  # waits for the device

    return step


@dataclass(frozen=True)
class ArmTimes:
    """What one arm took, in seconds.

    Attributes:
        first_call: the first step, which compiles: caches are empty, the compiler itself is loaded.
        steps: the measured steps, one for each round.
        loss: of the first step.
        graphs: graphs that were compiled in the first step.
    """

    first_call: float
    steps: tuple[float, ...]
    loss: float
    graphs: int


def take_turns(
    steps: Mapping[str, Step],
    caches: Path,
    rounds: int,
    warm_up: int,
    *,
    eager: Collection[str] = (),
    clock: Callable[[], float] = time.perf_counter,
    after_round: Callable[[], object] = lambda: None,
) -> dict[str, ArmTimes]:
    """Time the arms in turns: A B C A B C ...

    Args:
        steps: one training step of each arm.
        caches: folder in which each arm's first call finds caches of its own, empty.
        rounds: measured rounds.
        warm_up: rounds between the first calls and the measured ones; what they compile is no fault.
        eager: the arms that compile nothing.
        clock: what the measured steps are timed by, in seconds.
        after_round: called after the first calls, and after each round.

    Raises:
        RuntimeError: a compiled arm compiled nothing, or something was compiled in a measured round.
    """
    first, losses, graphs = {}, {}, {}
    if set(steps) - set(eager):
        load_compiler()
    for name, step in steps.items():
        before = compiled_graphs()
        with empty_caches(caches / name):
            start = time.perf_counter()
            losses[name] = step()
            first[name] = time.perf_counter() - start
        graphs[name] = compiled_graphs() - before
        if name not in eager and not graphs[name]:
            raise RuntimeError(f"{name} compiled nothing, so it ran eagerly")
    after_round()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    known = compiled_graphs()
    for index in range(warm_up + rounds):
        if index == warm_up:
            known = compiled_graphs()
        for name, step in steps.items():
            start = clock()
            step()
            if index >= warm_up:
                seconds[name].append(clock() - start)
        after_round()
    if compiled_graphs() != known:
        raise RuntimeError("a graph was compiled again in a measured round, so step times contain a compilation")
    return {name: ArmTimes(first[name], tuple(seconds[name]), losses[name], graphs[name]) for name in steps}


def load_compiler() -> None:
    """Compile a trivial function: importing the compiler takes seconds, which are no arm's."""
    # On a GPU for the GPU: a machine with one need not have the C++ compiler that code for a CPU asks for.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder, empty_caches(Path(folder)):
        torch.compile(torch.sin)(torch.zeros(8, device=device))


@contextlib.contextmanager
def empty_caches(folder: Path) -> Iterator[None]:
    """Let Inductor, Triton and the predictor keep their caches in `folder`, and forget what they hold in memory."""
    # Inductor sets Triton's folder once, where nothing else has: later arms would find what the first one compiled.
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "SPARSELORA_CACHE_DIR")
    before = {name: os.environ.get(name) for name in names}
    forget_compiled()
    os.environ.update({name: str(folder / name) for name in names})
    try:
        yield
    finally:
        forget_compiled()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
