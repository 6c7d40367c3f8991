"""`sparselora bank`: keep trained adapters with what is known of their data, and compose one for new data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from tabulate import tabulate

from sparse_compile.bank.adapter_bank import AdapterBank
from sparse_compile.cli.output import writing
from sparse_compile.cli.parameters import Data, Json

__all__ = ["bank"]

bank = typer.Typer(
    no_args_is_help=True,
    help="Keep trained adapters, and compose one for new data without training (docs/adapter_bank.md).",
)

Folder = Annotated[Path, typer.Argument(help="Folder of the bank.")]
Name = Annotated[str, typer.Argument(help="Name of an adapter of the bank.")]
Base = Annotated[Path, typer.Option(help="Folder of the model whose adapters the bank is for.")]


@bank.command()
def create(folder: Folder, base: Base, json: Json = False) -> None:
    """Make an empty bank for the adapters of a model."""
    with writing(as_json=json) as output:
        header = AdapterBank.create(folder, base).header
        output.result(asdict(header), lambda: f"{folder}: a bank for adapters of {header.base_name}")


@bank.command()
def add(
    folder: Folder,
    name: Name,
    adapter: Annotated[Path, typer.Option(help="Folder that PEFT saved.")],
    data: Annotated[str, typer.Option(help="What it was trained on: a file of JSON lines, or a dataset of the hub.")],
    base: Base,
    provenance: Annotated[str, typer.Option(help="Where it comes from, for those who read the list.")] = "",
    json: Json = False,
) -> None:
    """Copy a trained adapter into a bank."""
    with writing(as_json=json) as output:
        record = AdapterBank(folder).add(name, adapter, _ids(data, base), base=base, provenance=provenance)
        output.result(
            asdict(record),
            lambda: f"{name}: rank {record.rank}, {record.layers} layers, {record.tokens} tokens of data",
        )


@bank.command()
def remove(folder: Folder, name: Name, json: Json = False) -> None:
    """Take an adapter out of a bank, and delete the bank's copy of it."""
    with writing(as_json=json) as output:
        AdapterBank(folder).remove(name)
        output.result({"removed": name}, lambda: f"{name} is removed")


@bank.command("list")
def list_(folder: Folder, json: Json = False) -> None:
    """List the adapters of a bank."""
    with writing(as_json=json) as output:
        opened = AdapterBank(folder)
        records = opened.list()
        rows = [(each.name, each.rank, each.layers, each.tokens, each.added, each.provenance) for each in records]
        head = ("adapter", "rank", "layers", "tokens", "added", "provenance")
        output.result(
            {"base": asdict(opened.header), "adapters": [asdict(each) for each in records]},
            lambda: tabulate(rows, head, tablefmt="plain") if rows else f"{folder} is empty",
        )


@bank.command()
def check(folder: Folder, json: Json = False) -> None:
    """Read all of a bank, and say what is wrong with it; the exit status is 1 then."""
    with writing(as_json=json) as output:
        faults = AdapterBank(folder).check()
        output.result({"faults": faults}, lambda: "\n".join(faults) or "all is well")
    raise typer.Exit(1 if faults else 0)


@bank.command()
def repair(folder: Folder, json: Json = False) -> None:
    """Make the index of a bank again, from the records beside its adapters."""
    with writing(as_json=json) as output:
        opened = AdapterBank(folder)
        left_out = opened.repair()
        names = [record.name for record in opened.list()]
        output.result(
            {"adapters": names, "left_out": left_out},
            lambda: "\n".join((f"{len(names)} adapters are in the index", *(f"left out: {each}" for each in left_out))),
        )


@bank.command()
def compose(
    folder: Folder,
    data: Data,
    base: Base,
    out: Annotated[Path, typer.Option(help="Folder for the adapter, which is not there yet.")],
    rank: Annotated[
        int | None, typer.Option(min=1, help="Rank of the adapter; by default the largest of the bank.")
    ] = None,
    distance: Annotated[
        str, typer.Option(help="jensen_shannon, kl, mmd, wasserstein or wasserstein_ids.")
    ] = "jensen_shannon",
    weighting: Annotated[str, typer.Option(help="standardised, softmin or mlp.")] = "standardised",
    temperature: Annotated[float | None, typer.Option(help="Of the softmin; by default chosen on the bank.")] = None,
    json: Json = False,
) -> None:
    """Compose an adapter for new data of those in a bank. Nothing is trained."""
    with writing(as_json=json) as output:
        found = AdapterBank(folder).compose(
            _ids(data, base),
            out,
            rank=rank,
            distance=distance,
            weighting=weighting,
            temperature=temperature,
            progress=not json,
        )
        largest = sorted(found.weights.items(), key=lambda each: -each[1])
        output.result(
            {**asdict(found), "folder": str(found.folder)},
            lambda: "\n".join(
                (
                    tabulate(
                        [(name, round(weight, 3)) for name, weight in largest], ("adapter", "weight"), tablefmt="plain"
                    ),
                    f"{out}: rank {found.rank}, which leaves {found.error:.1%} of the sum out",
                )
            ),
        )


def _ids(data: str, base: Path) -> Iterator[tuple[int, ...]]:
    """Yield the token ids of each row, by the tokenizer of the base."""
    from sparse_compile.cli.models import ModelChoice, load_tokenizer
    from sparse_compile.cli.records import example_of, read_records

    tokenizer = load_tokenizer(ModelChoice(str(base)))
    for record in read_records(data):
        yield example_of(record, tokenizer).input_ids
