"""`sparselora bench`: training steps of a user's model on the user's rows, dense, exact and sparse, in turns."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import nn
from tqdm.auto import tqdm

from sparse_compile.cli.batches import DataChoice, read_batches
from sparse_compile.cli.errors import needs
from sparse_compile.cli.models import ModelChoice, load_model, load_tokenizer
from sparse_compile.cli.output import Output
from sparse_compile.cli.paired import ArmTimes, paired_ratio, spread, take_turns, training_step
from sparse_compile.compiler.compile import compile as compile_sparse
from sparse_compile.compiler.explain import explain
from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.torch_private.dynamo import without_recompile_limit

__all__ = ["run_bench"]

_DENSE = "dense"
_EXACT = SparseLoRAConfig(preset="exact", start_step=0)


def run_bench(output: Output, model: ModelChoice, data: DataChoice, config: SparseLoRAConfig, rounds: int) -> None:
    """Time the arms in turns on the same batches, and write a table.

    Args:
        output: where the table goes.
        model: what is loaded; the arms share its frozen weights.
        data: the batches, which all arms step through over and over.
        config: the options of the sparse arm.
        rounds: measured steps of each arm, after two rounds through all batches that are not measured.
    """
    needs("bench", ("transformers", "peft"))
    loaded, told = load_model(model)
    output.note(told)
    batches, told = read_batches(data, load_tokenizer(model), next(loaded.parameters()).device)
    output.note(told)
    arms = {_DENSE: None, "exact": _EXACT, _name_of(config): config}
    models = {name: _arm(loaded, options) for name, options in arms.items()}
    warm_up = 2 * len(batches)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        # All arms run the same `forward`, for which Dynamo counts graphs; beyond its limit it would run them eagerly.
        stack.enter_context(without_recompile_limit())
        bar = stack.enter_context(tqdm(desc="bench", unit=" rounds", total=1 + warm_up + rounds))
        steps = {name: training_step(each, *batches) for name, each in models.items()}
        times = take_turns(steps, Path(folder), rounds, warm_up, after_round=bar.update)
    flops = {
        name: explain(_arm(loaded, None), config=options, **batches[0]).flops_after if options else None
        for name, options in arms.items()
    }
    flops[_DENSE] = explain(_arm(loaded, None), config=_EXACT, **batches[0]).flops_before
    rows = {name: _row(name, times, flops[name]) for name in arms}
    output.result({"rounds": rounds, "arms": rows}, lambda: _table(rows))


def _name_of(config: SparseLoRAConfig) -> str:
    """Return what the sparse arm is called: the option that says what its sites become, or its preset."""
    return config.site_option or config.preset


def _arm(model: nn.Module, config: SparseLoRAConfig | None) -> nn.Module:
    """Return a compiled copy of a model that shares its frozen weights and buffers; by Inductor without options."""
    shared = [*(each for each in model.parameters() if not each.requires_grad), *model.buffers()]
    copied = copy.deepcopy(model, memo={id(each): each for each in shared})
    if config is not None:
        return compile_sparse(copied, config)
    copied.compile(backend="inductor")
    return copied


def _row(name: str, times: Mapping[str, ArmTimes], flops: float | None) -> dict[str, Any]:
    own = times[name]
    ratio = paired_ratio(times[_DENSE].steps, own.steps)
    return {
        "step_seconds": asdict(spread(own.steps)),
        "against_dense": asdict(ratio),
        "first_step_seconds": own.first_call,
        "first_loss": own.loss,
        "flops": flops,
    }


def _table(rows: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table("arm", "step, median (ms)", "20% to 80%", "against dense", "GFLOPs", "first step (s)")
    for name, row in rows.items():
        step, ratio = row["step_seconds"], row["against_dense"]
        table.add_row(
            name,
            f"{1e3 * step['median']:.1f}",
            f"{1e3 * step['p20']:.1f} to {1e3 * step['p80']:.1f}",
            f"{ratio['median']:.2f}x",
            f"{row['flops'] / 1e9:.2f}",
            f"{row['first_step_seconds']:.1f}",
        )
    return table
