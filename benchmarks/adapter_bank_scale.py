"""Compose an adapter of hundreds, at the layer sizes of an 8B model: seconds and memory.

    python benchmarks/adapter_bank_scale.py [--adapters 500] [--rank 16] [--blocks 1] [--folder DIR]

The bank is synthetic: each adapter has normal factors in bf16 on the seven linear layers of so many blocks of Llama 3
8B, and the token counts of a data set of its own among 16 kinds. All are composed with even weights: no adapter stands
out, so the spectrum of the sum is flat, which is the most that the iteration of `sparse_compile/bank/lowrank.py` can
have to do. Blocks are all alike; a model of 32 takes 32 times as long, and keeps the tensors of a whole adapter.
A row is appended to `benchmarks/results/adapter_bank.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from adapter_bank_rows import RESULTS, tables
from rows import append_rows, environment
from safetensors.torch import save_file

from sparse_compile.bank.adapter_bank import AdapterBank

HIDDEN, FFN, HEADS_KV, VOCABULARY, MODEL_BLOCKS = 4096, 14336, 1024, 128256, 32
LAYERS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HEADS_KV, HIDDEN),
    "self_attn.v_proj": (HEADS_KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}
KINDS = 16


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(arguments)
    origin = environment("adapter_bank_scale.py", [re.sub(r"[^=,]*/", "", each) for each in arguments])
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        folder = Path(place)
        bank, added = _filled(folder, args)
        one = args.rank * sum(sum(sizes) for sizes in LAYERS.values()) * args.blocks
        ids = _data(0)
        near, weighing = _measured(lambda: bank.neighbours(ids))
        even = dict.fromkeys(near.weights, 1 / args.adapters)
        found, composing = _measured(lambda: bank.combine(even, folder / "out", rank=args.rank))
    per_model = MODEL_BLOCKS / args.blocks
    row = {
        "kind": "scale",
        "adapters": args.adapters,
        "rank": args.rank,
        "blocks": args.blocks,
        "adapter_mb": one * 4 / 1e6,
        "add_seconds": added,
        **{f"weigh_{name}": value for name, value in weighing.items()},
        **{f"compose_{name}": value for name, value in composing.items()},
        "model_cpu_minutes": (weighing["cpu_seconds"] + composing["cpu_seconds"] * per_model) / 60,
        "exact": found.exact,
        "error": found.error,
    }
    append_rows([{**row, **origin}], args.out)
    print(tables([row]))
    return 0


def _filled(folder: Path, args: argparse.Namespace) -> tuple[AdapterBank, float]:
    """Make a bank; return it with the median seconds of adding an adapter."""
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    (base / "config.json").write_text(json.dumps({"vocab_size": VOCABULARY}))
    save_file({"model.embed_tokens.weight": torch.zeros(VOCABULARY, 8)}, base / "model.safetensors")
    config = {"peft_type": "LORA", "r": args.rank, "lora_alpha": 2 * args.rank, "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    bank = AdapterBank.create(folder / "bank", base)
    # Windows of one long draw, far fewer numbers than all of them: they meet too rarely to be alike.
    normal, generator = torch.randn(2**24, generator=torch.Generator().manual_seed(0)).bfloat16(), random.Random(0)
    seconds = []
    for number in range(args.adapters):
        factors = {}
        for block in range(args.blocks):
            for layer, (outputs, inputs) in LAYERS.items():
                path = f"base_model.model.model.layers.{block}.{layer}"
                for factor, size in (("A", (args.rank, inputs)), ("B", (outputs, args.rank))):
                    start = generator.randrange(len(normal) - size[0] * size[1])
                    drawn = normal[start : start + size[0] * size[1]].reshape(size).clone()
                    factors[f"{path}.lora_{factor}.weight"] = drawn
        save_file(factors, adapter / "adapter_model.safetensors")
        start = time.perf_counter()
        bank.add(f"a{number:03}", adapter, _data(number), base=base)
        seconds.append(time.perf_counter() - start)
    return bank, sorted(seconds)[len(seconds) // 2]


def _data(number: int) -> list[torch.Tensor]:
    """Return 20,000 token ids, rare ones more rarely, about a kind of their own."""
    generator = torch.Generator().manual_seed(number)
    drawn = (VOCABULARY ** torch.rand(20_000, generator=generator, dtype=torch.float64)).long() - 1
    return [(drawn + number % KINDS * 50) % VOCABULARY]


def _measured(run: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Return what a function returns, and its seconds, those of the processor, and the MB by which memory rose.

    Mapped files are left out: the system takes their pages back when it needs them.
    """
    before, peak, done = _anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, _anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start, processor = time.perf_counter(), time.process_time()
    try:
        found = run()
    finally:
        taken = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - processor}
        done.set()
        watcher.join()
    return found, {**taken, "mb": max(0, peak - before) / 1e6}


def _anonymous() -> int:
    """Return the bytes of the process that no file backs (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=500)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=1, help="blocks of the model that have adapters")
    parser.add_argument("--folder", type=Path, help="where the bank is made (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where rows are kept (default: %(default)s)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
