"""Rows of data: what is read of them, and which of their tokens carry the loss."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

from checkpoints import word_tokenizer, write_rows
from sparse_compile.cli.records import IGNORE_INDEX, Collator, DataError, Example, Record, read_records, tokenize


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{nonsense", "not JSON"),
        (["a"], "this is list"),
        ({"texts": "a"}, "or 'question' and 'answer' or 'messages' or 'text', found ['texts']"),
        ({"text": ""}, "'text' is empty or no text"),
        ({"prompt": "a", "completion": " "}, "'completion' is empty or no text"),
        ({"question": 1, "answer": "b"}, "'question' is empty or no text"),
        ({"messages": []}, "list of messages"),
        ({"messages": [{"content": "a"}]}, "'role' and 'content'"),
        ({"messages": [{"role": "user", "content": "a"}]}, "the last message is the assistant's, this one is 'user'"),
    ],
)
def test_bad_rows_are_named_by_their_line(tmp_path: Path, row: object, message: str) -> None:
    good = {"prompt": "a", "completion": "b"}
    write_rows(tmp_path / "data.jsonl", [good, "", row, good])
    with pytest.raises(DataError, match="1 bad rows") as caught:
        read_records(str(tmp_path / "data.jsonl"))
    assert "data.jsonl:3: " in str(caught.value)
    assert message in str(caught.value)


def test_many_bad_rows_are_counted(tmp_path: Path) -> None:
    write_rows(tmp_path / "data.jsonl", [{}] * 15)
    with pytest.raises(DataError, match=r"(?s)15 bad rows.*data.jsonl:10: .*\.\.\. and 5 more") as caught:
        read_records(str(tmp_path / "data.jsonl"))
    assert "data.jsonl:11: " not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"prompt": "a b", "completion": "c d"}, "<s> a b", "c d </s>"),
        ({"question": "a b", "answer": "c"}, "<s> Question: a b Answer:", "c </s>"),
        ({"text": "a b c"}, "<s>", "a b c </s>"),
    ],
    ids=["prompt", "question", "text"],
)
def test_loss_lies_on_the_answer_only(tmp_path: Path, row: object, prompt: str, answer: str) -> None:
    write_rows(tmp_path / "data.jsonl", [row])
    tokenizer = word_tokenizer("a b c d Question: Answer:")
    (example,), too_long = tokenize(read_records(str(tmp_path / "data.jsonl")), tokenizer, max_length=64)
    assert too_long == 0
    learned = [label for label in example.labels if label != IGNORE_INDEX]
    assert tokenizer.decode(learned) == answer
    assert tokenizer.decode(example.input_ids[: example.prompt_length]) == prompt
    assert example.labels[example.prompt_length :] == example.input_ids[example.prompt_length :]


def test_chat_loss_lies_on_every_answer() -> None:
    tokenizer = word_tokenizer("user : assistant q1 q2 a1 a2")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} : {{ m.content }} </s> {% endfor %}"
        "{% if add_generation_prompt %}assistant : {% endif %}"
    )
    messages = [
        {"role": r, "content": c} for r, c in zip(["user", "assistant"] * 2, ["q1", "a1", "q2", "a2"], strict=True)
    ]
    record = Record("a2", "here:1", messages=tuple(messages))
    (example,), _ = tokenize([record], tokenizer, max_length=64)
    learned = [label for label in example.labels if label != IGNORE_INDEX]
    assert tokenizer.decode(learned) == "a1 </s> a2 </s>"
    assert tokenizer.decode(example.input_ids[: example.prompt_length]).endswith("user : q2 </s> assistant :")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        # Only the last answer is shown: what was said before is rewritten.
        ("{% for m in messages %}{{ m.content if loop.last or m.role == 'user' else '' }} {% endfor %}", "only append"),
    ],
)
def test_unusable_chat_template_is_said(template: str | None, message: str) -> None:
    tokenizer = word_tokenizer("q1 q2 a1 a2")
    tokenizer.chat_template = template
    messages = [
        {"role": r, "content": c} for r, c in zip(["user", "assistant"] * 2, ["q1", "a1", "q2", "a2"], strict=True)
    ]
    with pytest.raises(DataError, match=message) as caught:
        tokenize([Record("a2", "here:1", messages=tuple(messages))], tokenizer, max_length=64)
    assert "here:1" in str(caught.value)


def test_rows_that_are_too_long_are_left_out() -> None:
    tokenizer = word_tokenizer("a b c d e f g")
    rows = [Record("g", "here:1", prompt="a"), Record("g", "here:2", prompt="a b c d e f")]
    examples, too_long = tokenize(rows, tokenizer, max_length=5)
    assert (len(examples), too_long) == (1, 1)
    with pytest.raises(DataError, match="none of 2 rows fits into 2 tokens"):
        tokenize(rows, tokenizer, max_length=2)


@pytest.mark.parametrize(("longest", "length"), [(1, 4), (4, 4), (5, 8), (9, 10)])
def test_batches_are_padded_to_few_lengths(longest: int, length: int) -> None:
    short = Example((7,), (7,), prompt_length=0, answer="")
    long = Example((7,) * longest, (IGNORE_INDEX,) * longest, prompt_length=0, answer="")
    batch = Collator(pad_token_id=0, multiple_of=4, max_length=10)([short, long])
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        "input_ids": (2, length),
        "attention_mask": (2, length),
        "labels": (2, length),
    }
    assert batch["attention_mask"].sum(1).tolist() == [1, longest]
    assert (batch["labels"] != IGNORE_INDEX).sum() == 1
