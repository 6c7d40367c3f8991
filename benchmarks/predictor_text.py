"""Read real text into batches, for `predictor_quality.py` and `lors.py`."""

from __future__ import annotations

import functools
import itertools
import json
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
import transformers
from torch import Tensor

Encode: TypeAlias = Callable[[str], list[int]]
"""From text to token ids, without special tokens."""

Example: TypeAlias = tuple[list[int], list[int]]
"""Token ids of a question, which begins with BOS, and of its answer, which ends with EOS."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Right-padded sequences.

    Attributes:
        input_ids: Int64 (B, S).
        attention_mask: Int64 (B, S), zero at padding.
        labels: Int64 (B, S), -100 at the question and at padding.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def load_encoder(folder: Path) -> Encode:
    """Return the function from text to token ids of a model folder, without special tokens."""
    if (folder / "tokenizer.json").exists():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        return lambda text: tokenizer.encode(text, add_special_tokens=False)
    return sentencepiece_bpe((folder / "tokenizer.model").read_bytes())


def sentencepiece_bpe(model: bytes) -> Encode:
    """Return the encoder of a SentencePiece BPE model with identity normalisation and byte fallback.

    A word starts as its characters; of all neighbours that make a piece, those with the highest score are merged, the
    leftmost first; a character that is no piece becomes its bytes. Written out here, because a vocabulary that small
    is not worth a dependency. No piece may hold an inner space, so that words are encoded apart.

    Args:
        model: The protobuf file, `ModelProto`: pieces in field 1 (piece 1, score 2, type 3).
    """
    pieces = [dict(_protobuf_fields(value)) for field, value in _protobuf_fields(model) if field == 1]
    names = [piece[1].decode() for piece in pieces]
    normal = {name: i for i, (name, piece) in enumerate(zip(names, pieces, strict=True)) if piece.get(3, 1) == 1}
    score = {name: struct.unpack("<f", pieces[i].get(2, bytes(4)))[0] for name, i in normal.items()}
    first_byte = names.index("<0x00>")
    assert not any("▁" in name[1:] for name in normal), "a piece crosses a space"

    @functools.cache
    def encode_word(word: str) -> tuple[int, ...]:
        parts = list(word)
        while True:
            pairs = [(-score[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in score]
            if not pairs:
                break
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids = ([normal[part]] if part in normal else [first_byte + byte for byte in part.encode()] for part in parts)
        return tuple(itertools.chain.from_iterable(ids))

    def encode(text: str) -> list[int]:
        words = re.split(" +", text.strip(" "))
        return [token for word in words for token in encode_word("▁" + word)]

    return encode


def _protobuf_fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the number and the raw value of each field: an int, or bytes."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(message):
        tag = varint()
        if tag & 7 == 0:
            yield tag >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(tag & 7) or varint()
        yield tag >> 3, message[position : position + size]
        position += size


def read_batches(data: Path, encode: Encode, config: Any, *, batches: int, batch_size: int) -> list[Batch]:
    """Read the first questions and answers of a JSON-lines file that fit the model's positions.

    Args:
        data: Records with the keys `question` and `answer`.
        encode: From `load_encoder`.
        config: The model's configuration.
        batches: How many batches.
        batch_size: Sequences per batch.

    Raises:
        ValueError: If the file holds too few records that fit.
    """
    examples = read_examples(data, encode, config, batches * batch_size, config.max_position_embeddings)
    return [pad(examples[i : i + batch_size]) for i in range(0, len(examples), batch_size)]


def read_examples(data: Path, encode: Encode, config: Any, count: int, longest: int) -> list[Example]:
    """Read the first questions and answers that are no longer together than `longest` tokens.

    Args:
        data: JSON lines with the keys `question` and `answer`; or lines `question||answer`, in a file named `.txt`.
        encode: From `load_encoder`.
        config: The model's configuration.
        count: How many.
        longest: Tokens.

    Raises:
        ValueError: If the file holds too few records that fit.
    """
    examples: list[Example] = []
    with data.open(encoding="utf-8") as lines:
        for line in lines:
            asked, answered = _parts_of(line, data.suffix)
            question = [config.bos_token_id, *encode(asked)]
            answer = [*encode(answered), config.eos_token_id]
            if len(question) + len(answer) <= longest:
                examples.append((question, answer))
            if len(examples) == count:
                return examples
    raise ValueError(f"{data} holds only {len(examples)} records that fit, not {count}")


def _parts_of(line: str, suffix: str) -> tuple[str, str]:
    if suffix == ".txt":
        asked, _, answered = line.strip().partition("||")
        return asked, answered
    record = json.loads(line)
    return record["question"], record["answer"]


def pad(examples: Sequence[Example], length: int | None = None) -> Batch:
    """Pad examples to `length` tokens, or to the longest of them."""
    length = length or max(len(question) + len(answer) for question, answer in examples)
    ids, mask, labels = (torch.full((len(examples), length), value) for value in (0, 0, -100))
    for row, (question, answer) in enumerate(examples):
        end = len(question) + len(answer)
        ids[row, :end] = torch.tensor(question + answer)
        mask[row, :end] = 1
        labels[row, len(question) : end] = torch.tensor(answer)
    return Batch(ids, mask, labels)
