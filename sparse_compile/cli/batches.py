"""Batches of a user's rows, as training steps would get them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_compile.cli.errors import CommandError
from sparse_compile.cli.records import IGNORE_INDEX, Collator, Example, example_of, pad_token_id, read_records

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Batch", "DataChoice", "random_batch", "read_batches"]

Batch = dict[str, Tensor]
"""`input_ids`, `attention_mask` and `labels`, each (batch, length)."""


@dataclass(frozen=True)
class DataChoice:
    """What the options of a command say of the data.

    Attributes:
        data: a file of JSON lines, or the id of a dataset of the hub.
        batch_size: rows of a batch.
        batches: how many batches.
        max_length: tokens; longer rows are left out.
    """

    data: str
    batch_size: int
    batches: int
    max_length: int


def read_batches(
    choice: DataChoice, tokenizer: PreTrainedTokenizerBase, device: torch.device, at_least: int = 1
) -> tuple[list[Batch], str]:
    """Read rows in a random order that is always the same, and make batches of them.

    The loss lies on answers: on those of a prompt, on every message of the assistant, on all of a plain text. Rows are
    padded on the right, to the longest of their batch.

    Args:
        choice: what is read, and how much of it.
        tokenizer: the model's.
        device: where the batches are to be.
        at_least: how many batches there must be.

    Returns:
        The batches, and a line about them.

    Raises:
        DataError: no such file, or bad rows.
        CommandError: too few rows.
    """
    records = read_records(choice.data)
    random.Random(0).shuffle(records)
    wanted = choice.batches * choice.batch_size
    examples: list[Example] = []
    too_long = 0
    for record in records:
        if len(examples) == wanted:
            break
        example = example_of(record, tokenizer)
        if len(example.input_ids) > choice.max_length:
            too_long += 1
        else:
            examples.append(example)
    count = len(examples) // choice.batch_size
    if count < at_least:
        long = f", {too_long} more are longer than --max-length {choice.max_length}" if too_long else ""
        raise CommandError(
            f"--data {choice.data}: {len(examples)} rows{long}, and {at_least * choice.batch_size} are needed: give "
            "more rows, or a smaller --batch-size"
        )
    collate = Collator(pad_token_id(tokenizer), 1, choice.max_length)
    size = choice.batch_size
    collated = [collate(examples[start : start + size]) for start in range(0, count * size, size)]
    batches = [{name: value.to(device) for name, value in batch.items()} for batch in collated]
    return batches, _told(choice, batches, too_long)


def random_batch(vocabulary: int, rows: int, length: int, device: torch.device) -> Batch:
    """Return a batch of random tokens of which the last quarter carries the loss."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (rows, length), generator=generator)
    labels = tokens.clone()
    labels[:, : length - length // 4] = IGNORE_INDEX
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
    return {name: value.to(device) for name, value in batch.items()}


def _told(choice: DataChoice, batches: list[Batch], too_long: int) -> str:
    """Say what was read, and how much of it is context: of context alone something is left out."""
    places = sum(batch["labels"].numel() for batch in batches)
    padding = sum(int((batch["attention_mask"] == 0).sum()) for batch in batches)
    learned = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches)
    lengths = sorted(batch["labels"].shape[1] for batch in batches)
    long = f"; {too_long} longer than --max-length {choice.max_length} are left out" if too_long else ""
    count = "1 batch" if len(batches) == 1 else f"{len(batches)} batches"
    return (
        f"{count} of {choice.batch_size} rows of {choice.data}, {lengths[0]} to {lengths[-1]} tokens long: "
        f"{learned / places:.0%} carry the loss, {padding / places:.0%} are padding{long}"
    )
