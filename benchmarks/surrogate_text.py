"""What `surrogate_quality.py` learns from and judges by: records of several files, with the share of context wanted."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from predictor_text import Batch, Encode, Example, read_examples


def read_mixture(files: Sequence[Path], encode: Encode, config: Any, count: int, longest: int) -> list[Example]:
    """Read `count` records, as many of each file, one file after the other; `read_examples` says which."""
    return [each for file in files for each in read_examples(file, encode, config, count // len(files), longest)]


def with_context_share(
    examples: Sequence[Example], share: float, shots: Sequence[Example], longest: int
) -> list[Example]:
    """Give each record the wanted share of context tokens.

    Where it has less, records of another question stand in front of it, drawn with a fixed seed, the first of them cut.
    Where it has more, the end of its question becomes part of the answer.

    Args:
        examples: the records.
        share: above zero, below one.
        shots: records to put in front of others.
        longest: tokens; a record that becomes longer is left out.

    Raises:
        ValueError: all `shots` have one question.
    """
    if len({tuple(question) for question, _ in shots}) < 2:
        raise ValueError("records of two questions are needed, to put one in front of the other")
    draw = random.Random(0)
    changed = []
    for question, answer in examples:
        front = round(share / (1 - share) * len(answer)) - len(question)
        if front >= 0:
            changed.append(([*_shots(question, front, shots, draw), *question], answer))
        else:
            tokens = [*question, *answer]
            cut = max(1, round(share * len(tokens)))
            changed.append((tokens[:cut], tokens[cut:]))
    return [each for each in changed if len(each[0]) + len(each[1]) <= longest]


def _shots(question: list[int], count: int, shots: Sequence[Example], draw: random.Random) -> list[int]:
    """Return `count` tokens of records of other questions; the first of them is BOS."""
    tokens: list[int] = []
    while len(tokens) < count:
        asked, answered = draw.choice(shots)
        if asked != question:
            tokens = [*asked, *answered, *tokens]
    return [*question[:1], *tokens[len(tokens) - count + 1 :]] if count else []


def context_share(examples: Sequence[Example]) -> float:
    """Return the share of context tokens."""
    context = sum(len(question) for question, _ in examples)
    return context / (context + sum(len(answer) for _, answer in examples))


def hide_context(batch: Batch) -> Batch:
    """Let no token see the context, except each sequence's first token: something must be left to attend to."""
    seen = batch.attention_mask * (batch.labels != -100)
    seen[:, 0] = 1
    return replace(batch, attention_mask=seen)
