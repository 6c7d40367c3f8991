"""`sparselora explain`: what the backend would do to a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparse_compile.cli.batches import Batch, DataChoice, random_batch, read_batches
from sparse_compile.cli.errors import CommandError, needs
from sparse_compile.cli.models import ModelChoice, load_model, load_tokenizer
from sparse_compile.cli.output import Output
from sparse_compile.compiler.explain import explain
from sparse_compile.options.config import SparseLoRAConfig

__all__ = ["run_explain"]

_RANDOM_LENGTH = 512


def run_explain(
    output: Output, model: ModelChoice, data: DataChoice | None, config: SparseLoRAConfig, html: Path | None, size: int
) -> None:
    """Trace one training step, and write the report.

    Args:
        output: where it goes.
        model: what is loaded.
        data: whose first batch is traced; None for a batch of random tokens.
        config: the options to explain.
        html: file to write the page of the report to.
        size: rows of a batch of random tokens.
    """
    needs("explain", ("transformers", "peft"))
    if html is not None and html.suffix != ".html":
        raise CommandError(f"--html {html}: a page is a file whose name ends in .html")
    loaded: Any  # what else it is than a module, transformers and PEFT know
    loaded, told = load_model(model)
    output.note(told)
    device = next(loaded.parameters()).device
    batch: Batch
    if data is None:
        length = min(_RANDOM_LENGTH, getattr(loaded.config, "max_position_embeddings", None) or _RANDOM_LENGTH)
        batch = random_batch(loaded.get_input_embeddings().num_embeddings, size, length, device)
        output.note(f"no --data: {size} rows of {length} random tokens, whose last quarter carries the loss")
    else:
        (batch, *_), told = read_batches(data, load_tokenizer(model), device)
        output.note(told)
    report = explain(loaded, config=config, **batch)
    if html is not None:
        report.save(html)
        output.note(f"the page is {html}")
    output.result(report.to_dict(), lambda: str(report))
