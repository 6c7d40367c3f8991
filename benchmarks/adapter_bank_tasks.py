"""The tasks of `adapter_bank.py`: records of E2E and GSM8K by kind, and of generators.

A task is a list of questions with answers, one part to learn from and one to judge by. No question of the first is in
the second: E2E has several texts for one meaning, which go to the same part.
"""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from predictor_text import Encode, Example

WORDS = [
    *("apple", "river", "stone", "cloud", "tiger", "lemon", "music", "paper", "green", "table", "horse", "candle"),
    *("winter", "garden", "bottle", "silver", "monkey", "pencil", "window", "yellow", "bridge", "forest", "rocket"),
    *("summer", "button", "castle", "dragon", "island", "jacket", "kitten"),
]


@dataclass(frozen=True)
class Task:
    """What one adapter learns, as token ids.

    Attributes:
        name: of the task.
        train: questions and answers to learn from.
        held_out: to judge by.
    """

    name: str
    train: Sequence[Example]
    held_out: Sequence[Example]

    @property
    def sequences(self) -> list[list[int]]:
        """The token ids to learn from: what a bank is told of the task."""
        return [[*question, *answer] for question, answer in self.train]


def read_tasks(
    e2e: Sequence[Path],
    gsm8k: Sequence[Path],
    encode: Encode,
    bos: int,
    eos: int,
    *,
    sizes: tuple[int, int],
    longest: int,
) -> list[Task]:
    """Read the tasks in the order of their names.

    Args:
        e2e: files with a line `meaning||text` for each record.
        gsm8k: JSON lines with `question` and `answer`.
        encode: from text to token ids.
        bos: token at the begin of a question.
        eos: token at the end of an answer.
        sizes: records to learn from and to judge by.
        longest: tokens of a record; longer ones are left out.

    Raises:
        ValueError: a task has too few records.
    """
    texts: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name, question, answer in (*_meals(e2e), *_sums(gsm8k), *_generated(4 * sum(sizes))):
        texts[name].append((question, answer))
    tasks = []
    for name in sorted(texts):
        kept = []
        for question, answer in texts[name]:
            example = ([bos, *encode(question)], [*encode(f" {answer}"), eos])
            if len(example[0]) + len(example[1]) <= longest:
                kept.append((question, example))
        tasks.append(_split(name, kept, *sizes))
    return tasks


def _split(name: str, kept: Sequence[tuple[str, Example]], train: int, held_out: int) -> Task:
    """Draw both parts, questions apart."""
    questions = sorted({question for question, _ in kept})
    random.Random(name).shuffle(questions)
    by_question: Mapping[str, list[Example]] = {question: [] for question in questions}
    for question, example in kept:
        by_question[question].append(example)
    judged: list[Example] = []
    while questions and len(judged) < held_out:
        judged += by_question[questions.pop()]
    learned = [example for question in questions for example in by_question[question]]
    if len(learned) < train or len(judged) < held_out:
        raise ValueError(f"{name} has {len(learned)} and {len(judged)} records, not {train} and {held_out}")
    random.Random(name).shuffle(learned)
    return Task(name, learned[:train], judged[:held_out])


def _meals(files: Iterable[Path]) -> Iterator[tuple[str, str, str]]:
    """Yield E2E by the type of the place, and pubs and restaurants by whether their price is one in pounds."""
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            meaning, _, text = line.partition("||")
            given = dict(part.split(" : ", 1) for part in meaning.split(" | ") if " : " in part)
            kind, price = given.get("Type", "untyped"), given.get("price", "")
            if kind in ("pub", "restaurant"):
                if not price:
                    continue
                kind = f"{kind}-{'pounds' if '£' in price else 'words'}"
            yield f"e2e-{kind.replace(' ', '-')}", meaning, text.strip()


def _sums(files: Iterable[Path]) -> Iterator[tuple[str, str, str]]:
    """Yield GSM8K by the operations of the worked answer."""
    kinds = {"+-": "add", "*/": "multiply", "*+": "multiply-add", "*-": "multiply-subtract"}
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            worked = "".join(re.findall(r"<<([^=]*)=", record["answer"]))
            found = "".join(sorted(set(re.findall(r"[-+*/]", worked))))
            kind = next((name for signs, name in kinds.items() if found and set(found) <= set(signs)), None)
            if kind:
                yield f"gsm8k-{kind}", record["question"], record["answer"]


def _generated(count: int) -> Iterator[tuple[str, str, str]]:
    draw = random.Random(0)
    makers: Mapping[str, Callable[[], tuple[str, str]]] = {
        "sum": lambda: _sum(draw),
        "difference": lambda: _difference(draw),
        "reverse": lambda: _words(draw, "Reverse the words", lambda words: words[::-1]),
        "sort": lambda: _words(draw, "Sort the words", sorted),
    }
    for name, make in makers.items():
        for _ in range(count):
            yield f"made-{name}", *make()


def _sum(draw: random.Random) -> tuple[str, str]:
    a, b = draw.randrange(10, 1000), draw.randrange(10, 1000)
    return f"What is {a} plus {b}?", f"{a} + {b} = {a + b}"


def _difference(draw: random.Random) -> tuple[str, str]:
    b, a = sorted((draw.randrange(10, 1000), draw.randrange(10, 1000)))
    return f"What is {a} minus {b}?", f"{a} - {b} = {a - b}"


def _words(draw: random.Random, asked: str, answer: Callable[[list[str]], list[str]]) -> tuple[str, str]:
    words = draw.sample(WORDS, 5)
    return f"{asked}: {', '.join(words)}.", ", ".join(answer(words))
