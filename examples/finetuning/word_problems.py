"""Generate grade-school-like word problems with worked answers, for a demo that needs no download.

Two kinds share their numbers and their arithmetic, not their wording:

* ``owners`` (short, for pre-training): two people own things; one sum or one difference.
* ``stories`` (long, for fine-tuning): a day on a bus, in a shop or on a farm, told in more sentences than matter; two
  steps of arithmetic. About three quarters of the tokens are the problem, one quarter is its worked answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

NAMES = (
    "Ann",
    "Ben",
    "Cleo",
    "Dan",
    "Eva",
    "Finn",
    "Gita",
    "Hugo",
    "Ida",
    "Jon",
    "Kim",
    "Leo",
    "Mia",
    "Noah",
    "Olga",
    "Paul",
)
ITEMS = ("apples", "books", "cards", "coins", "eggs", "pens", "shells", "stamps", "toys", "marbles")
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
WEATHER = ("sunny", "rainy", "windy", "cold", "warm", "cloudy")
COLOURS = ("red", "blue", "green", "yellow", "white", "black")
NUMBERS = range(19)
"""Every number that occurs in a problem or in its worked answer."""


@dataclass(frozen=True)
class Problem:
    """A question with its worked answer; the number after ``####`` is the result (as in GSM8K).

    Words and punctuation are separated by single spaces, so that a word-level tokenizer restores the text exactly.
    """

    question: str
    answer: str


def owners(rng: random.Random) -> Problem:
    """Write one short problem about two people who own the same kind of thing (one step of arithmetic)."""
    first, second = rng.sample(NAMES, 2)
    item = rng.choice(ITEMS)
    if rng.random() < 0.5:
        a, b = rng.randint(1, 9), rng.randint(1, 9)
        question = f"{first} has {a} {item} . {second} has {b} {item} . How many {item} in total ?"
        return Problem(question, f"{a} + {b} = {a + b} . #### {a + b}")
    a = rng.randint(2, 18)
    b = rng.randint(1, min(9, a - 1))
    question = f"{first} has {a} {item} . {second} takes {b} {item} . How many {item} are left ?"
    return Problem(question, f"{a} - {b} = {a - b} . #### {a - b}")


def _two_steps(rng: random.Random) -> tuple[int, int, int]:
    """Draw ``start, more, fewer`` such that every number on the way lies between 1 and 18."""
    start, more = rng.randint(2, 9), rng.randint(1, 9)
    return start, more, rng.randint(1, min(9, start + more - 1))


def _scenery(rng: random.Random) -> tuple[str, str, str, str]:
    """Draw a day, its weather and two colours: words that the answer does not depend on."""
    return (rng.choice(WEEKDAYS), rng.choice(WEATHER), *rng.sample(COLOURS, 2))


def _worked(start: int, more: int, fewer: int) -> str:
    total = start + more
    return (
        f"First {start} and {more} more : {start} + {more} = {total} . "
        f"Then {fewer} fewer : {total} - {fewer} = {total - fewer} . #### {total - fewer}"
    )


def _bus(rng: random.Random) -> Problem:
    start, more, fewer = _two_steps(rng)
    driver, friend = rng.sample(NAMES, 2)
    day, weather, colour, other_colour = _scenery(rng)
    sentences = [
        f"It is a {weather} {day} and {driver} drives the {colour} bus to the city .",
        f"When the bus leaves the station there are {start} people on the bus .",
        f"{friend} looks at the {other_colour} houses along the river .",
        f"At the bridge {more} people get on .",
        f"At the park {fewer} people get off and the bus goes on .",
    ]
    return Problem(" ".join(sentences) + " How many people are on the bus now ?", _worked(start, more, fewer))


def _shop(rng: random.Random) -> Problem:
    start, more, fewer = _two_steps(rng)
    seller, buyer = rng.sample(NAMES, 2)
    day, weather, colour, other_colour = _scenery(rng)
    item = rng.choice(ITEMS)
    sentences = [
        f"{seller} has a shop with a {colour} door by the river .",
        f"On {day} morning there are {start} {item} on the table .",
        f"It is {weather} and nobody comes in .",
        f"Then the {other_colour} bus from the city brings {more} {item} .",
        f"After school {buyer} comes in , talks and buys {fewer} {item} .",
    ]
    return Problem(" ".join(sentences) + f" How many {item} are on the table now ?", _worked(start, more, fewer))


def _farm(rng: random.Random) -> Problem:
    start, more, fewer = _two_steps(rng)
    farmer, child = rng.sample(NAMES, 2)
    day, weather, colour, other_colour = _scenery(rng)
    item = rng.choice(("eggs", "apples"))
    sentences = [
        f"{farmer} lives on a farm with {colour} walls behind the bridge .",
        f"In the morning there are {start} {item} in the basket .",
        f"{child} comes on {day} because the school is closed and the day is {weather} .",
        f"By the {other_colour} boat {child} finds {more} {item} for the basket .",
        f"In the evening {farmer} and {child} eat {fewer} {item} .",
    ]
    return Problem(" ".join(sentences) + f" How many {item} are in the basket now ?", _worked(start, more, fewer))


def stories(rng: random.Random) -> Problem:
    """Write one long problem, most of whose sentences do not matter (two steps of arithmetic)."""
    return rng.choice((_bus, _shop, _farm))(rng)


KINDS: Mapping[str, Callable[[random.Random], Problem]] = MappingProxyType({"owners": owners, "stories": stories})
"""Every kind of problem by its name."""


def generate(kind: str, count: int, seed: int) -> list[Problem]:
    """Write ``count`` different problems of one kind; the same seed writes the same problems.

    Raises:
        ValueError: if ``kind`` is not one of :data:`KINDS`.
    """
    if kind not in KINDS:
        raise ValueError(f"no problems of kind {kind!r}; there are: {', '.join(KINDS)}")
    rng = random.Random(seed)
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        problem = KINDS[kind](rng)
        problems.setdefault(problem.question, problem)
    return list(problems.values())
