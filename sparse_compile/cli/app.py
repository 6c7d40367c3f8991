"""The commands of `sparselora` with their options; what each does stands in a module of its own."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from sparse_compile.cli.bank import bank
from sparse_compile.cli.choices import config_of
from sparse_compile.cli.group import OneLineErrors
from sparse_compile.cli.models import DEFAULT_RANK, DEFAULT_TARGETS, ModelChoice
from sparse_compile.cli.output import writing
from sparse_compile.cli.parameters import (
    Adapter,
    Batches,
    BatchSize,
    Config,
    Data,
    Dtype,
    Json,
    MaxLength,
    Model,
    OptionalData,
    Preset,
    Rank,
    RecipeOption,
    Targets,
)

__all__ = ["app"]

app = typer.Typer(cls=OneLineErrors, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(bank, name="bank")


@app.callback(invoke_without_command=True)
def sparselora(
    ctx: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    """Faster LoRA fine-tuning: look at a model, calibrate it, time it, and see whether all is well on this machine."""
    if version:
        typer.echo(f"sparse_compile {metadata.version('sparse-compile')}")
    elif ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


@app.command()
def explain(
    model: Model,
    data: OptionalData = None,
    preset: Preset = None,
    recipe: RecipeOption = None,
    config: Config = None,
    html: Annotated[Path | None, typer.Option(help="Also write the report as a page, to this file.")] = None,
    adapter: Adapter = None,
    rank: Rank = DEFAULT_RANK,
    targets: Targets = DEFAULT_TARGETS,
    dtype: Dtype = "auto",
    batch_size: BatchSize = 2,
    max_length: MaxLength = 2048,
    json: Json = False,
) -> None:
    """Say what the backend would do to a training step of a model. Nothing is trained."""
    from sparse_compile.cli.batches import DataChoice
    from sparse_compile.cli.explain import run_explain

    with writing(as_json=json) as output:
        chosen = ModelChoice(model, adapter, dtype, rank, targets)
        rows = None if data is None else DataChoice(data, batch_size, 1, max_length)
        run_explain(output, chosen, rows, config_of(preset, recipe, config), html, batch_size)


@app.command()
def calibrate(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder for the recipe.")],
    loss_budget: Annotated[float | None, typer.Option(help="Goal: rise of the held-out loss, nats a token.")] = None,
    speedup: Annotated[float | None, typer.Option(help="Goal: how many times as fast a step is to be.")] = None,
    flops: Annotated[float | None, typer.Option(help="Goal: share of a step's FLOPs that may be left.")] = None,
    adapter: Adapter = None,
    rank: Rank = DEFAULT_RANK,
    targets: Targets = DEFAULT_TARGETS,
    dtype: Dtype = "auto",
    batch_size: BatchSize = 8,
    batches: Batches = 16,
    max_length: MaxLength = 2048,
    json: Json = False,
) -> None:
    """Fit maps to the blocks of a model, choose some of them for a goal, and save them as a recipe."""
    from sparse_compile.calibration.goals import goal_of
    from sparse_compile.cli.batches import DataChoice
    from sparse_compile.cli.calibrate import run_calibrate

    with writing(as_json=json) as output:
        chosen = ModelChoice(model, adapter, dtype, rank, targets)
        rows = DataChoice(data, batch_size, batches, max_length)
        run_calibrate(output, chosen, rows, goal_of(loss_budget, speedup, flops), out)


@app.command()
def bench(
    model: Model,
    data: Data,
    preset: Preset = None,
    recipe: RecipeOption = None,
    config: Config = None,
    adapter: Adapter = None,
    rank: Rank = DEFAULT_RANK,
    targets: Targets = DEFAULT_TARGETS,
    dtype: Dtype = "auto",
    batch_size: BatchSize = 4,
    batches: Batches = 4,
    max_length: MaxLength = 2048,
    rounds: Annotated[int, typer.Option(min=1, help="Measured steps of each arm.")] = 12,
    json: Json = False,
) -> None:
    """Time training steps of a model on rows of data: dense by Inductor, exact and sparse, in turns."""
    from sparse_compile.cli.batches import DataChoice
    from sparse_compile.cli.bench import run_bench

    with writing(as_json=json) as output:
        chosen = ModelChoice(model, adapter, dtype, rank, targets)
        rows = DataChoice(data, batch_size, batches, max_length)
        run_bench(output, chosen, rows, config_of(preset, recipe, config, start_step=0, end_step=None), rounds)


@app.command()
def doctor(json: Json = False) -> None:
    """Say whether all that the backend needs is here, and train a tiny model. The text is for an issue."""
    from sparse_compile.cli.doctor import run_doctor

    with writing(as_json=json) as output:
        healthy = run_doctor(output)
    raise typer.Exit(0 if healthy else 1)


@app.command()
def dump(
    folder: Annotated[Path, typer.Argument(help="Folder that dump_dir or SPARSELORA_DUMP named.")],
    open_: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    json: Json = False,
) -> None:
    """Name the pages of a dump, or say what it holds."""
    from sparse_compile.cli.dump import run_dump

    with writing(as_json=json) as output:
        run_dump(output, folder, in_browser=open_)
