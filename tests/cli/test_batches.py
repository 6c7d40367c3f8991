"""Batches of a user's rows: where the loss lies, what is padded, what is left out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoints import question_rows, word_tokenizer, write_rows
from sparse_compile.cli.batches import DataChoice, random_batch, read_batches
from sparse_compile.cli.errors import CommandError
from sparse_compile.cli.records import IGNORE_INDEX

CPU = torch.device("cpu")


def test_rows_are_padded_to_the_longest_of_their_batch(rows: Path) -> None:
    batches, told = read_batches(DataChoice(str(rows), 3, 2, 64), word_tokenizer(), CPU)
    assert len(batches) == 2
    for batch in batches:
        lengths = batch["attention_mask"].sum(1)
        assert batch["input_ids"].shape == (3, int(lengths.max()))
        learned = batch["labels"] != IGNORE_INDEX
        assert learned.sum(1).tolist() == [3, 3, 3]  # two words and the end
        assert torch.equal(batch["labels"][learned], batch["input_ids"][learned])
        assert not learned[batch["attention_mask"] == 0].any()
    learned = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches)
    places = sum(batch["labels"].numel() for batch in batches)
    assert f"2 batches of 3 rows of {rows}" in told and f"{learned / places:.0%} carry the loss" in told


def test_the_order_is_random_and_always_the_same(rows: Path) -> None:
    choice = DataChoice(str(rows), 16, 1, 64)
    (first,), (again,) = (read_batches(choice, word_tokenizer(), CPU)[0] for _ in range(2))
    assert torch.equal(first["input_ids"], again["input_ids"])
    assert first["input_ids"][:, 3].tolist() != sorted(first["input_ids"][:, 3].tolist())


def test_long_rows_are_left_out_and_told(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl", [*question_rows(2), *question_rows(2, prompt_words=50)])
    batches, told = read_batches(DataChoice(str(data), 1, 8, 24), word_tokenizer(), CPU)
    assert len(batches) == 2 and "2 longer than --max-length 24 are left out" in told
    with pytest.raises(CommandError, match=r"2 rows, 2 more are longer than --max-length 24, and 6 are needed"):
        read_batches(DataChoice(str(data), 3, 8, 24), word_tokenizer(), CPU, at_least=2)


def test_a_random_batch_has_the_loss_at_its_end() -> None:
    batch = random_batch(50, 2, 16, CPU)
    assert (batch["labels"] != IGNORE_INDEX).sum(1).tolist() == [4, 4]
    assert torch.equal(batch["labels"][:, 12:], batch["input_ids"][:, 12:])
    assert int(batch["input_ids"].max()) < 50
