"""Weights from distances: the softmin by hand, the temperature and the network by leave-one-out."""

from __future__ import annotations

from math import exp

import pytest
import torch
from torch import Tensor

from sparse_compile.bank.errors import BankError
from sparse_compile.bank.weighting import WEIGHTINGS, leave_one_out_error, standardised, weigh

OWN = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
NONE = torch.zeros(3, 3, dtype=torch.float64)


def never() -> Tensor:
    raise AssertionError("nothing is to be chosen by the adapters")


def clusters() -> tuple[Tensor, Tensor]:
    """Distances and inner products of three pairs: data and adapters of a pair are alike, others are not."""
    pair = torch.arange(6) // 2
    alike = (pair.unsqueeze(1) == pair).double()
    return 1 - 0.9 * alike, torch.eye(6, dtype=torch.float64) * 0.1 + alike * 0.9


def test_a_softmin_by_hand() -> None:
    found = weigh("softmin", OWN, NONE, never, temperature=2.0)
    parts = [exp(-each / 2) for each in OWN.tolist()]
    assert found.values.tolist() == pytest.approx([each / sum(parts) for each in parts])
    assert found.temperature == 2.0 and found.error is None


def test_a_standardised_softmin_by_hand() -> None:
    # The mean is 7/3, the deviation sqrt(14/9).
    z = [(each - 7 / 3) / (14 / 9) ** 0.5 for each in OWN.tolist()]
    parts = [exp(-each / 0.5) for each in z]
    found = weigh("standardised", OWN, NONE, never, temperature=0.5)
    assert found.values.tolist() == pytest.approx([each / sum(parts) for each in parts])


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_units_of_the_distance_do_not_matter(weighting: str) -> None:
    between, gram = clusters()
    own = torch.tensor([0.1, 0.2, 0.9, 1.0, 0.8, 1.1], dtype=torch.float64)
    one, other = (weigh(weighting, scale * own, scale * between, lambda: gram).values for scale in (1, 1000))
    torch.testing.assert_close(one, other)


def test_the_error_by_hand() -> None:
    # The adapters are (1, 0), (0, 2) and (3, 3). Half of each of the others: (1.5, 2.5), (2, 1.5), (0.5, 1).
    adapters = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]], dtype=torch.float64)
    halves = 0.5 * (1 - torch.eye(3, dtype=torch.float64))
    cosines = [1.5 / (1.5**2 + 2.5**2) ** 0.5, 1.5 / 2.5, 1.5 / (2 * 1.25) ** 0.5]
    assert leave_one_out_error(halves, adapters @ adapters.t()).tolist() == pytest.approx(
        [1 - each for each in cosines]
    )


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_what_is_chosen_on_a_bank_of_pairs_trusts_the_near_ones(weighting: str) -> None:
    between, gram = clusters()
    own = torch.tensor([0.1, 0.1, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    found = weigh(weighting, own, between, lambda: gram)
    assert found.values.sum().item() == pytest.approx(1)
    assert found.values[:2].sum() > 0.9
    assert found.error is not None and found.error < 0.3


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_where_distances_say_nothing_weights_are_even(weighting: str) -> None:
    """Each adapter is alike to those whose data are farthest: near ones are no good."""
    between, gram = clusters()
    own = torch.tensor([0.1, 0.1, 0.2, 0.2, 0.2, 0.2], dtype=torch.float64)
    found = weigh(weighting, own, 1.1 - between, lambda: gram)
    assert found.values[:2].sum() < 0.45


@pytest.mark.parametrize("count", [1, 2])
def test_a_small_bank_has_nothing_to_leave_out(count: int) -> None:
    found = weigh("standardised", OWN[:count], NONE[:count, :count], never)
    assert found.values.sum().item() == pytest.approx(1) and found.error is None
    with pytest.raises(BankError, match="at least 4"):
        weigh("mlp", OWN[:count], NONE[:count, :count], never)


def test_equal_distances_have_equal_weights() -> None:
    assert standardised(torch.ones(4)).tolist() == [0.0] * 4
    between, gram = clusters()
    for weighting in WEIGHTINGS:
        found = weigh(weighting, torch.zeros(6, dtype=torch.float64), torch.zeros_like(between), lambda: gram)
        assert found.values.tolist() == pytest.approx([1 / 6] * 6)


@pytest.mark.parametrize(
    ("weighting", "temperature", "message"),
    [("uniform", None, "softmin, standardised, mlp"), ("mlp", 1.0, "above zero"), ("softmin", 0.0, "above zero")],
)
def test_wrong_arguments(weighting: str, temperature: float | None, message: str) -> None:
    with pytest.raises(BankError, match=message):
        weigh(weighting, OWN, NONE, never, temperature)
