"""Counts of token ids, of every form that data come in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sparse_compile.bank.errors import BankError
from sparse_compile.bank.tokens import count_tokens


@pytest.mark.parametrize(
    "data",
    [
        [[0, 2, 2], [2, 3]],
        [torch.tensor([0, 2, 2]), torch.tensor([2, 3], dtype=torch.int32)],
        [{"input_ids": [0, 2, 2]}, {"input_ids": torch.tensor([[2, 3]])}],
        [{"input_ids": torch.tensor([[0, 2, 2], [2, 3, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}],
        [[], [0, 2, 2, 2, 3]],
    ],
)
def test_forms_of_data(data: Any) -> None:
    assert count_tokens(data, 5).tolist() == [1, 0, 3, 1, 0]


def test_data_are_read_once() -> None:
    def pieces() -> Iterator[list[int]]:
        yield [1]
        yield [1, 1]

    assert count_tokens(pieces(), 2).tolist() == [0, 3]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no token"),
        ([[]], "no token"),
        ([[1], [1, 5]], "token 5 of sequence 1 .* vocabulary of 5; .* tokenizer of the base"),
        ([[-1]], "token -1 of sequence 0"),
        (["text"], "sequence 0 .* no sequence of token ids"),
        ([{"labels": [1]}], "sequence 0 .* no sequence of token ids"),
        ([[0.5]], "float32, not token ids"),
        ([{"input_ids": [1, 2], "attention_mask": [1]}], "sequence 0"),
    ],
)
def test_what_are_no_data(data: Any, message: str) -> None:
    with pytest.raises(BankError, match=message):
        count_tokens(data, 5)
