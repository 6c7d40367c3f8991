"""The op that hands on what a block reads and returns: which rows, to whom, and that it is a sound op."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from sparse_compile.kernels.observed_rows import observing

OBSERVE = torch.ops.sparselora.observe_rows
SCORED = torch.tensor([True, False, True, True, False])
ROWS = torch.tensor([4, 2, -1, 0])  # an output token, a context token, a spare row, a context token


def arguments(key: str = "site") -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, str]:
    x, y = torch.arange(8.0).reshape(4, 2), torch.arange(12.0).reshape(4, 3)
    return x, y, ROWS, SCORED, torch.zeros((), dtype=torch.int64), key


def test_rows_of_context_tokens_are_handed_on_and_counted() -> None:
    given = arguments()
    taken: list[tuple[Tensor, Tensor]] = []
    with observing({"site": lambda x, y: taken.append((x, y))}):
        OBSERVE(*given)
    ((x, y),) = taken
    assert torch.equal(x, given[0][[1, 3]]) and torch.equal(y, given[1][[1, 3]])
    assert int(given[4]) == 2


def test_nobody_else_gets_them() -> None:
    given = arguments()
    taken: list[tuple[Tensor, Tensor]] = []
    with observing({"another": lambda x, y: taken.append((x, y))}):
        OBSERVE(*given)
    OBSERVE(*given)
    with observing({"site": lambda x, y: taken.append((x, y))}):
        other = threading.Thread(target=OBSERVE, args=given)
        other.start()
        other.join()
    assert taken == [] and int(given[4]) == 0


def test_it_is_a_sound_op() -> None:
    torch.library.opcheck(OBSERVE, arguments())


def test_a_compiled_graph_keeps_the_call() -> None:
    taken: list[Tensor] = []

    def step(x: Tensor, y: Tensor, rows: Tensor, scored: Tensor, seen: Tensor) -> Tensor:
        OBSERVE(x, y, rows, scored, seen, "site")
        return x * 2

    given = arguments()
    with observing({"site": lambda x, _: taken.append(x.clone())}):
        torch.compile(step, backend="aot_eager", fullgraph=True)(*given[:5])
    assert [len(x) for x in taken] == [2] and int(given[4]) == 2
