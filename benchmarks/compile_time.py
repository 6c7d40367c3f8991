"""Measure what compilation costs: depth by depth, cold and with warm caches.

    python benchmarks/compile_time.py                       # 8, 16 and 32 blocks, about 15 minutes on two cores
    python benchmarks/compile_time.py --layers 16 --presets exact,o2
    python benchmarks/compile_time.py --factors             # the predictor's factors of one block of an 8B Llama

Each figure is that of a fresh process that has loaded the compiler. A row holds the first step of PEFT + Inductor or of
this backend, which is a dense one, and for `o2` the step at which the schedule turns sparse, with caches that start
empty; then the same in a second process that finds the caches of the first. Widths are small: they do not change what
is compiled.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rows import append_rows, environment
from workloads import WORKLOADS, adapted_model, base_model, make_batch

from sparse_compile.cli.paired import empty_caches, load_compiler, training_step

RESULTS = Path(__file__).resolve().parent / "results" / "compile_time.jsonl"
SIZES = {"hidden": 256, "ffn": 896, "heads": 4, "kv_heads": 1, "vocab": 1024, "batch": 1, "length": 256, "output": 64}
LLAMA_8B_BLOCK = {
    "q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "gate": (14336, 4096), "up": (14336, 4096),
}  # fmt: skip
"""Weights whose factors a sparse block needs, (out, in): those of the out-projections predict nothing."""


def first_steps(layers: int, preset: str, caches: Path) -> dict[str, float]:
    """Return the seconds of the first step and, of `o2`, of the step that turns sparse, in this process.

    Args:
        layers: blocks of the model.
        preset: `"inductor"`, or a preset of this backend.
        caches: folder of all caches.
    """
    workload = dataclasses.replace(WORKLOADS["math10k-mini"], layers=layers, **SIZES)
    model = adapted_model(base_model(workload), workload)
    if preset == "inductor":
        model.compile(backend="inductor")
    else:
        # Named sites, as a preset would leave such narrow ones dense for their cost: those that it has by depth.
        sites = {f"layers.{layer}.mlp": 0.99 for layer in _between(0.09, 0.97, layers)}
        sites |= {f"layers.{layer}.self_attn": 0.75 for layer in _between(0.43, 0.97, layers)}
        options: dict[str, Any] = {"preset": "exact", "start_step": 1}
        model.compile(backend="sparselora", options=options | ({"layer_sparsity": sites} if preset == "o2" else {}))
    step = training_step(model, make_batch(workload))
    load_compiler()
    found = {}
    with empty_caches(caches):
        for name in ("first", "turn") if preset == "o2" else ("first",):
            start = time.perf_counter()
            step()
            found[name] = time.perf_counter() - start
    return found


def _between(low: float, high: float, layers: int) -> list[int]:
    return [layer for layer in range(1, layers - 1) if low <= layer / layers < high]


def in_a_fresh_process(layers: int, preset: str, caches: Path) -> dict[str, float]:
    """Run `first_steps` in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(first_steps, layers, preset, caches).result()


def factor_seconds(rank: int = 8) -> dict[str, float]:
    """Return the seconds that the factors of each weight of an 8B block take, cold and from the cache."""
    from sparse_compile.predictor.store import FactorStore

    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed, (name, shape) in enumerate(LLAMA_8B_BLOCK.items()):
            weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).div(64).bfloat16()
            for kind in ("cold", "cached"):
                store = FactorStore(folder, rank, seed=0)
                another = weight.clone()  # what is known of this very tensor is no file
                start = time.perf_counter()
                store.get(name, another)
                seconds[f"{name} {kind}"] = time.perf_counter() - start
    return seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="8,16,32", help="comma list of depths")
    parser.add_argument("--presets", default="exact,o2", help="comma list of exact, o2")
    parser.add_argument("--factors", action="store_true", help="measure the predictor's factors instead")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of rows to append to")
    args = parser.parse_args(argv)
    presets = args.presets.split(",")
    if not set(presets) <= {"exact", "o2"}:
        parser.error(f"presets are exact and o2, got {args.presets}")
    if args.factors:
        factors = factor_seconds()
        for name, seconds in factors.items():
            print(f"{name}: {seconds:.2f} s", flush=True)
        for kind in ("cold", "cached"):
            print(f"a block, {kind}: {sum(each for name, each in factors.items() if name.endswith(kind)):.2f} s")
        append_rows([{"factors": factors} | environment("compile_time.py", sys.argv[1:])], args.out)
        return 0
    for layers in map(int, args.layers.split(",")):
        for preset in ("inductor", *presets):
            with tempfile.TemporaryDirectory() as folder:
                cold, warm = (in_a_fresh_process(layers, preset, Path(folder)) for _ in range(2))
            row = {"layers": layers, "preset": preset, "cold": cold, "warm": warm}
            append_rows([row | environment("compile_time.py", sys.argv[1:])], args.out)
            texts = (" + ".join(f"{each:.1f}" for each in found.values()) for found in (cold, warm))
            print("{} blocks, {}: cold {} s, warm {} s".format(layers, preset, *texts), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
