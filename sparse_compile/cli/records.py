"""Read question-and-answer data and turn it into tokens whose loss lies on the answers only."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
"""Label of a token without loss: what `torch.nn.functional.cross_entropy` ignores."""

ERRORS_SHOWN = 10

FIELDS = (("prompt", "completion"), ("question", "answer"))
"""Names of the fields of a row that has a prompt and an answer."""


class DataError(ValueError):
    """Data that cannot be trained on; the message names the file and the lines."""


@dataclass(frozen=True)
class Record:
    """One row: a conversation that ends in an assistant's message, a prompt with its answer, or a text.

    Attributes:
        messages: chat messages (`role`, `content`), or None where the row has a prompt.
        prompt: text before the answer; empty where there are messages, and where all of a text is to be learned.
        answer: the text to learn; with messages the last of them.
        source: where the row stands, for error messages (`train.jsonl:17`).
    """

    answer: str
    source: str
    prompt: str = ""
    messages: tuple[Mapping[str, str], ...] | None = None


@dataclass(frozen=True)
class Example:
    """One tokenised record.

    Attributes:
        input_ids: tokens of the whole sequence, special tokens included.
        labels: the same tokens where there is loss, `IGNORE_INDEX` elsewhere.
        prompt_length: number of tokens before the (last) answer.
        answer: the (last) answer as text.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    prompt_length: int
    answer: str

    @property
    def answer_tokens(self) -> int:
        """Return the number of tokens with loss."""
        return sum(label != IGNORE_INDEX for label in self.labels)


def read_records(source: str) -> list[Record]:
    """Read a `.jsonl` file, or the `train` split of a dataset of the Hugging Face hub (`ID` or `ID:CONFIGURATION`).

    Raises:
        DataError: there is no such file or dataset, or rows are bad (each is named with its line and its fault).
    """
    path = Path(source)
    if path.suffix in (".jsonl", ".json") or path.exists():
        return _records(_rows_of_file(path), str(path))
    return _records(enumerate(_hub_rows(source), start=1), source)


def _rows_of_file(path: Path) -> Iterator[tuple[int, object]]:
    """Yield line number and row; a line that is no JSON is yielded as its `JSONDecodeError`."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError as error:
                    yield number, error


def _hub_rows(name: str) -> Iterable[object]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(f"{name}: not a file; data from the hub needs `pip install datasets`") from error
    dataset, _, configuration = name.partition(":")
    try:
        rows: Iterable[object] = load_dataset(dataset, configuration or None, split="train")
    except (ValueError, OSError) as error:
        raise DataError(f"{name}: neither a .jsonl file nor a dataset that can be loaded ({error})") from error
    return rows


def _records(rows: Iterable[tuple[int, object]], origin: str) -> list[Record]:
    records, faults = [], []
    for number, row in rows:
        try:
            records.append(_record(row, f"{origin}:{number}"))
        except DataError as error:
            faults.append(str(error))
    if faults:
        more = [f"... and {len(faults) - ERRORS_SHOWN} more"] if len(faults) > ERRORS_SHOWN else []
        raise DataError("\n".join([f"{len(faults)} bad rows:", *faults[:ERRORS_SHOWN], *more]))
    if not records:
        raise DataError(f"{origin}: no rows")
    return records


def _record(row: object, source: str) -> Record:
    """Make a record of one row of data, in whichever of the four formats it is."""
    if isinstance(row, json.JSONDecodeError):
        raise DataError(f"{source}: not JSON ({row.msg} at column {row.colno})")
    if not isinstance(row, Mapping):
        raise DataError(f"{source}: a row is an object, this is {type(row).__name__}")
    if "messages" in row:
        return _chat_record(row["messages"], source)
    for prompt_field, answer_field in FIELDS:
        if prompt_field in row and answer_field in row:
            prompt, answer = (_text(row, name, source) for name in (prompt_field, answer_field))
            if prompt_field == "question":
                prompt, answer = f"Question: {prompt}\nAnswer:", f" {answer}"
            return Record(answer, source, prompt=prompt)
    if "text" in row:
        return Record(_text(row, "text", source), source)
    expected = " or ".join(f"{a!r} and {b!r}" for a, b in FIELDS)
    raise DataError(f"{source}: expected {expected} or 'messages' or 'text', found {sorted(map(str, row))}")


def _chat_record(messages: object, source: str) -> Record:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError(f"{source}: 'messages' is a list of messages")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f"{source}: a message has 'role' and 'content'")
        _text(message, "content", source)
    if messages[-1]["role"] != "assistant":
        raise DataError(f"{source}: the last message is the assistant's, this one is {messages[-1]['role']!r}")
    return Record(messages[-1]["content"], source, messages=tuple(messages))


def _text(row: Mapping[str, Any], name: str, source: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{source}: {name!r} is empty or no text")
    return value


def tokenize(
    records: Iterable[Record], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[Example], int]:
    """Tokenise records; those longer than `max_length` tokens are left out rather than cut in their answer.

    Returns:
        The examples, and the number of records left out.

    Raises:
        DataError: nothing fits, or the chat template cannot be used (see `_chat_example`).
    """
    examples, too_long = [], 0
    for record in records:
        example = example_of(record, tokenizer)
        if len(example.input_ids) <= max_length:
            examples.append(example)
        else:
            too_long += 1
    if not examples:
        raise DataError(f"none of {too_long} rows fits into {max_length} tokens (--max-length)")
    return examples, too_long


def example_of(record: Record, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Tokenise one record, however long.

    Raises:
        DataError: the chat template cannot be used (see `_chat_example`).
    """
    return _prompt_example(record, tokenizer) if record.messages is None else _chat_example(record, tokenizer)


def _prompt_example(record: Record, tokenizer: PreTrainedTokenizerBase) -> Example:
    # Tokenised apart, so that the border between prompt and answer is exactly the one that generation will meet.
    prompt = list(tokenizer(record.prompt)["input_ids"])
    if len(prompt) > 1 and prompt[-1] == tokenizer.eos_token_id:
        prompt.pop()
    answer = [*tokenizer(record.answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return Example(
        (*prompt, *answer), (*[IGNORE_INDEX] * len(prompt), *answer), prompt_length=len(prompt), answer=record.answer
    )


def _chat_example(record: Record, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Tokenise a conversation; the loss lies on every assistant's message.

    What is an answer is found by tokenising the conversation up to it and including it, which works with any template
    that only appends.

    Raises:
        DataError: the tokenizer has no template, or its template rewrites earlier messages (some drop an earlier
            "thinking" part), so that the start of an answer cannot be told.
    """
    if tokenizer.chat_template is None:
        raise DataError(f"{record.source}: chat messages, but the tokenizer has no chat template")
    assert record.messages is not None
    messages = [dict(message) for message in record.messages]

    def tokens(count: int, *, add_generation_prompt: bool = False) -> list[int]:
        text = tokenizer.apply_chat_template(
            messages[:count], tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    input_ids = tokens(len(messages))
    labels = [IGNORE_INDEX] * len(input_ids)
    prompt_length = 0
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = tokens(index, add_generation_prompt=True), tokens(index + 1)
            if after[: len(before)] != before or input_ids[: len(after)] != after:
                raise DataError(
                    f"{record.source}: the chat template does not only append, so the tokens of message {index + 1} "
                    "cannot be told; give 'prompt' and 'completion' instead"
                )
            prompt_length = len(before)
            labels[prompt_length : len(after)] = after[prompt_length:]
    return Example(tuple(input_ids), tuple(labels), prompt_length, record.answer)


@dataclass(frozen=True)
class Collator:
    """Pad examples on the right to a batch of tensors, each (batch, length).

    Attributes:
        pad_token_id: token that fills up; its label is `IGNORE_INDEX` and its attention mask 0.
        multiple_of: the length is rounded up to a multiple of it, so that few lengths occur.
        max_length: but never beyond this.
    """

    pad_token_id: int
    multiple_of: int
    max_length: int

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Return `input_ids`, `attention_mask` and `labels` of a batch."""
        longest = max(len(example.input_ids) for example in examples)
        length = max(longest, min(math.ceil(longest / self.multiple_of) * self.multiple_of, self.max_length))

        def padded(rows: Iterable[Sequence[int]], fill: int) -> torch.Tensor:
            return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows])

        return {
            "input_ids": padded((example.input_ids for example in examples), self.pad_token_id),
            "attention_mask": padded(([1] * len(example.input_ids) for example in examples), 0),
            "labels": padded((example.labels for example in examples), IGNORE_INDEX),
        }


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that fills up batches; a tokenizer without one uses its end token, which is masked out."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
