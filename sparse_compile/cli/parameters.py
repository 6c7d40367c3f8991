"""The options that several commands have, each with its help."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = [
    "Adapter",
    "BatchSize",
    "Batches",
    "Config",
    "Data",
    "Dtype",
    "Json",
    "MaxLength",
    "Model",
    "OptionalData",
    "Preset",
    "Rank",
    "RecipeOption",
    "Targets",
]

Model = Annotated[str, typer.Option(help="Folder or hub id of a causal language model, or a folder with its adapter.")]
Adapter = Annotated[str | None, typer.Option(help="Folder or hub id of a PEFT adapter of the model.")]
Dtype = Annotated[str, typer.Option(help="Dtype of the frozen weights, such as bfloat16; auto: that of the files.")]
Rank = Annotated[int, typer.Option(min=1, help="Rank of the adapter that a model without one gets.")]
Targets = Annotated[str, typer.Option(help="Layers of that adapter, by name, with commas between them.")]
Data = Annotated[str, typer.Option(help="File of JSON lines (docs/command_line.md), or id of a dataset of the hub.")]
OptionalData = Annotated[str | None, typer.Option(help="File of JSON lines; without one, tokens are random.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows of a batch.")]
Batches = Annotated[int, typer.Option(min=1, help="How many batches are read.")]
MaxLength = Annotated[int, typer.Option(min=2, help="Tokens; longer rows are left out.")]
Preset = Annotated[str | None, typer.Option(help="none, exact, o1, o2 or auto.")]
RecipeOption = Annotated[str | None, typer.Option("--recipe", help="Recipe that stands in the place of a preset.")]
Config = Annotated[str | None, typer.Option(help="Options: a .json file, a published .yaml, or a SparseLoRA release.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else.")]
