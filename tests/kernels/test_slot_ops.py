"""Ops on vectors of fixed size: what they compute with spare slots, and that nothing in them waits for a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sparse_compile.kernels  # noqa: F401 - registers torch.ops.sparselora
from sparse_compile.kernels.token_rows import reference

OPS = torch.ops.sparselora
MASK = torch.tensor([[True, False, False], [False, True, False]])
ROWS, CONTEXT = torch.tensor([1, 4, -1, -1]), torch.tensor([0, 2, 3, 5, -1])
PROVIDERS = ["reference", "cpu_index"]


def x(*shape: int, seed: int = 0) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.requires_grad_()


CALLS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "token_slots": (OPS.token_slots, (MASK, 4, 5, "token_bucket")),
    "token_slots, all output": (OPS.token_slots, (torch.ones(2, 3, dtype=torch.bool), 6, 0, "token_bucket")),
    "loss_slots": (OPS.loss_slots, (torch.tensor([-100, 3, 4, -100]), -100, 3, "token_capacity")),
    "take_rows": (OPS.take_rows, (x(6, 5), ROWS, CONTEXT, None, "reference", 6)),
    "take_rows, columns": (OPS.take_rows, (x(6, 5), ROWS, CONTEXT, torch.tensor([0, 4]), "cpu_index", 6)),
    "put_rows": (OPS.put_rows, (x(4, 5), x(5, 5, seed=2), ROWS, CONTEXT, None, "reference", 6)),
    "put_rows, columns": (
        OPS.put_rows,
        (x(4, 5), x(5, 2, seed=2), ROWS, CONTEXT, torch.tensor([0, 4]), "cpu_index", 6),
    ),
    "select_rows": (OPS.select_rows, (x(6, 2, 5), ROWS, True)),
    "place_rows": (OPS.place_rows, (x(4, 2, 5), ROWS, 6, True)),
}


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name: str) -> None:
    op, arguments = CALLS[name]
    torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize("outputs", [0, 1, 5, 6])
@pytest.mark.parametrize("spare", [0, 1, 7])
def test_slots_hold_the_rows_of_a_split_and_then_none(outputs: int, spare: int) -> None:
    mask = torch.zeros(6, dtype=torch.bool)
    mask[torch.randperm(6, generator=torch.Generator().manual_seed(outputs))[:outputs]] = True
    expected = OPS.split_tokens(mask)
    found = OPS.token_slots(mask, outputs + spare, 6 - outputs + spare, "token_bucket")
    for slots, rows in zip(found, expected, strict=True):
        assert slots.tolist() == rows.tolist() + [-1] * spare
    target = torch.where(mask, 7, -100)
    loss = OPS.loss_slots(target, -100, outputs + spare, "token_bucket")
    assert loss.tolist() == OPS.loss_rows(target, -100).tolist() + [-1] * spare


def test_what_has_no_slot_is_an_error_that_names_numbers_and_option() -> None:
    with pytest.raises(RuntimeError, match=r"token_capacity: this batch has 2 output tokens, .* slots for 1. Raise"):
        OPS.token_slots(MASK, 1, 6, "token_capacity")
    with pytest.raises(RuntimeError, match=r"token_bucket: this batch has 4 context tokens, .* slots for 3. They were"):
        OPS.token_slots(MASK, 2, 3, "token_bucket")
    with pytest.raises(RuntimeError, match="this batch has 2 rows of the loss, and the graph has slots for 1"):
        OPS.loss_slots(torch.tensor([-100, 3, 4, -100]), -100, 1, "token_capacity")


@pytest.mark.parametrize("provider", PROVIDERS)
def test_put_undoes_take(provider: str) -> None:
    given = x(6, 5).detach()
    taken = OPS.take_rows(given, ROWS, CONTEXT, None, provider, 6)
    for part, rows in zip(taken, (ROWS, CONTEXT), strict=True):
        assert torch.equal(part, given[rows.clamp_min(0)]), "a spare slot holds row 0"
    spoilt = [
        part.masked_fill((rows < 0)[:, None], torch.nan) for part, rows in zip(taken, (ROWS, CONTEXT), strict=True)
    ]
    assert torch.equal(OPS.put_rows(*spoilt, ROWS, CONTEXT, None, provider, 6), given), "nothing reads a spare slot"


@pytest.mark.parametrize("columns", [None, torch.tensor([0, 3, 4])], ids=["whole", "columns"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_gradients_are_those_of_the_split(provider: str, columns: Tensor | None) -> None:
    """Of the input, and of weights that both roles multiply with: a spare row adds nothing to them."""
    width = 5 if columns is None else len(columns)

    def merged(given: Tensor, weight: Tensor, rows: tuple[Tensor, Tensor], tokens: int | None) -> Tensor:
        output, context = OPS.take_rows(given, *rows, columns, provider, tokens)
        output, context = (output @ weight).cos(), (context @ weight[:width, :width]).exp()
        return OPS.put_rows(output, context, *rows, columns, provider, tokens)

    given, weight = x(6, 5), x(5, 5, seed=1)
    assert torch.autograd.gradcheck(lambda *leaves: merged(*leaves, (ROWS, CONTEXT), 6), (given, weight))
    split = tuple(rows[rows >= 0] for rows in (ROWS, CONTEXT))
    values = merged(given, weight, (ROWS, CONTEXT), 6), merged(given, weight, split, None)
    torch.testing.assert_close(*values, rtol=0, atol=0)
    d = x(6, 5, seed=2).detach()
    slots, plain = (torch.autograd.grad(value, (given, weight), d) for value in values)
    for one, other in zip(slots, plain, strict=True):
        torch.testing.assert_close(one, other)


def test_rows_of_the_loss_pass_no_gradient_through_spare_slots() -> None:
    given, live = x(6, 2), (ROWS >= 0)[:, None]
    assert torch.autograd.gradcheck(lambda t: OPS.select_rows(t, ROWS, True).sin() * live, (given,))
    assert torch.autograd.gradcheck(lambda t: OPS.place_rows(t, ROWS, 6, True), (x(4, 2),))
    # Whatever comes back to a spare slot is dropped, and not added to row 0.
    (gradient,) = torch.autograd.grad(OPS.select_rows(given, ROWS, True).sum(), given)
    assert gradient[:, 0].tolist() == [0, 1, 0, 0, 1, 0]
    (gradient,) = torch.autograd.grad(OPS.place_rows(selected := x(4, 2), ROWS, 6, True).sum(), selected)
    assert gradient[:, 0].tolist() == [1, 1, 0, 0]


def test_slots_are_filled_without_data_dependent_sizes() -> None:
    """Stand-ins without a `ShapeEnv` refuse every size and number that is read from a tensor."""
    with torch._subclasses.FakeTensorMode() as mode:
        mask = mode.from_tensor(MASK)
        with pytest.raises(torch._subclasses.fake_tensor.DynamicOutputShapeException):
            reference.split_tokens(mask)
        assert [rows.shape for rows in reference.token_slots(mask, 4, 5)] == [(4,), (5,)]
