"""Each distance against numbers that are worked out by hand, and what all of them have in common."""

from __future__ import annotations

from math import log, sqrt

import pytest
import torch
from torch import Tensor

from sparse_compile.bank.distances import DISTANCES, ON_EMBEDDINGS, distances
from sparse_compile.bank.errors import BankError

COUNTS = torch.tensor([[3, 1, 0], [1, 1, 2], [6, 2, 0]])
"""(3/4, 1/4, 0), (1/4, 1/4, 1/2), and the first again."""
IDS = torch.tensor([2, 3, 7])
POINTS = torch.zeros(8, 1)
POINTS[IDS] = torch.tensor([[0.0], [3.0], [1.0]])


def shares(counts: Tensor) -> Tensor:
    return (counts.double() / counts.sum(1, keepdim=True)).float()


def between(name: str, counts: Tensor = COUNTS) -> Tensor:
    return distances(name, shares(counts), IDS, POINTS)


def test_wasserstein_of_ids_is_mass_times_way() -> None:
    # A half goes from token 2 to token 7.
    assert between("wasserstein_ids")[0, 1].item() == pytest.approx(0.5 * 5)


def test_wasserstein_goes_by_the_places_of_tokens() -> None:
    # In the order of places: tokens 2 at 0, 7 at 1, 3 at 3. A half goes from 0 to 1.
    assert between("wasserstein")[0, 1].item() == pytest.approx(0.5)


def test_wasserstein_is_a_mean_over_directions() -> None:
    points = torch.zeros(8, 2)
    points[IDS] = torch.tensor([[0.0, 0.0], [3.0, 0.0], [1.0, 10.0]])
    assert distances("wasserstein", shares(COUNTS), IDS, points)[0, 1].item() == pytest.approx((0.5 + 0.5 * 10) / 2)


def test_jensen_shannon() -> None:
    # m = (1/2, 1/4, 1/4)
    to_p = 0.75 * log(0.75 / 0.5) + 0.25 * log(1)
    to_q = 0.25 * log(0.25 / 0.5) + 0.25 * log(1) + 0.5 * log(0.5 / 0.25)
    assert between("jensen_shannon")[0, 1].item() == pytest.approx(sqrt((to_p + to_q) / 2))
    apart = torch.tensor([[1, 0, 0], [0, 0, 1]])
    assert between("jensen_shannon", apart)[0, 1].item() == pytest.approx(sqrt(log(2)))


def test_kl_goes_from_row_to_column_and_is_finite() -> None:
    mean = [(0.75 + 0.25 + 0.75) / 3, 0.25, 0.5 / 3]
    p, q = (
        [0.99 * each + 0.01 * m for each, m in zip(row, mean, strict=True)]
        for row in ((0.75, 0.25, 0), (0.25, 0.25, 0.5))
    )
    found = between("kl")
    assert found[0, 1].item() == pytest.approx(sum(a * log(a / b) for a, b in zip(p, q, strict=True)))
    assert found[1, 0].item() == pytest.approx(sum(b * log(b / a) for a, b in zip(p, q, strict=True)))
    assert found[0, 1].item() != pytest.approx(found[1, 0].item())


def test_mmd() -> None:
    # Distances between the places 0, 3, 1 are 3, 1, 2: their median is 2. p - q = (1/2, 0, -1/2).
    def kernel(distance: float) -> float:
        return sum((2 * scale) ** 2 / ((2 * scale) ** 2 + distance**2) for scale in (0.25, 0.5, 1, 2)) / 4

    assert between("mmd")[0, 1].item() == pytest.approx(sqrt(2 * 0.25 * (kernel(0) - kernel(1))))


@pytest.mark.parametrize("name", DISTANCES)
def test_alike_data_are_at_distance_zero_and_others_are_not(name: str) -> None:
    found = between(name)
    assert found[0, 2].item() == found[2, 0].item() == pytest.approx(0, abs=1e-7)
    assert found.diagonal().abs().max().item() < 1e-7
    assert found[0, 1] > 0.05 and found[1, 0] > 0.05


@pytest.mark.parametrize("name", DISTANCES)
def test_blocks_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p, ids = shares(torch.randint(1, 9, (4, 50))), torch.arange(50)
    points = torch.randn(50, 3)
    whole = distances(name, p, ids, points)
    monkeypatch.setattr("sparse_compile.bank.distances._BLOCK", 7)
    monkeypatch.setattr("sparse_compile.bank.distances._KERNEL_ROWS", 7)
    torch.testing.assert_close(distances(name, p, ids, points), whole)


@pytest.mark.parametrize("name", ON_EMBEDDINGS)
def test_a_distance_that_needs_a_ground_says_so(name: str) -> None:
    with pytest.raises(BankError, match="input embedding"):
        distances(name, shares(COUNTS), IDS, None)


def test_one_token_is_enough() -> None:
    for name in DISTANCES:
        assert distances(name, torch.ones(2, 1), torch.tensor([3]), POINTS).abs().max() == 0


def test_a_wrong_name_lists_the_right_ones() -> None:
    with pytest.raises(BankError, match="choose one of jensen_shannon, kl, mmd, wasserstein, wasserstein_ids"):
        between("cosine")
