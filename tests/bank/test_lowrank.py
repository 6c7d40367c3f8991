"""A sum of products as one product: exact, by iteration, of mixed ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from banks import write_adapter
from sparse_compile.bank.adapter import open_adapter
from sparse_compile.bank.lowrank import Term, refactor
from tolerances import assert_close_rms

LAYER = "layers.0.q"
WEIGHTS = (0.5, 0.2, 0.3)


def terms(folder: Path, ranks: Sequence[int] = (2, 5, 3), outputs: int = 24, inputs: int = 40) -> list[Term]:
    made = []
    for i, rank in enumerate(ranks):
        path = write_adapter(folder / str(i), rank, seed=i, layers={LAYER: (outputs, inputs)}, lora_alpha=3 + i)
        made.append(Term(open_adapter(path), WEIGHTS[i % 3]))
    return made


def dense(given: Sequence[Term]) -> Tensor:
    """The sum of products as the formula has it, in fp64."""
    total = torch.zeros(1, dtype=torch.float64)
    for term in given:
        a, b = (factor.double() for factor in term.adapter.factors(LAYER))
        alpha, rank = term.adapter.config["lora_alpha"], term.adapter.config["r"]
        total = total + term.weight * alpha / rank * b @ a
    return total


def test_the_whole_rank_is_the_sum_of_the_products(tmp_path: Path) -> None:
    given = terms(tmp_path)
    found = refactor(given, LAYER, rank=10)
    assert found.a.shape == (10, 40) and found.b.shape == (24, 10) and found.exact
    assert_close_rms(found.b @ found.a, dense(given), torch.float32)
    assert found.kept == pytest.approx(found.square) == pytest.approx(float(dense(given).square().sum()), rel=1e-5)


def test_the_sum_of_the_factors_apart_is_another_matrix(tmp_path: Path) -> None:
    given = terms(tmp_path, (4, 4, 4))
    a, b = (sum(term.weight * term.adapter.factors(LAYER)[k].double() for term in given) for k in (0, 1))
    apart = torch.as_tensor(b) @ torch.as_tensor(a)
    exact = dense([Term(term.adapter, term.weight / term.adapter.layers[LAYER].scale) for term in given])
    assert (apart - exact).norm() > 0.5 * exact.norm()


def test_a_lower_rank_is_the_best_one(tmp_path: Path) -> None:
    given = terms(tmp_path)
    u, values, vh = torch.linalg.svd(dense(given))
    found = refactor(given, LAYER, rank=3)
    assert_close_rms(found.b @ found.a, u[:, :3] * values[:3] @ vh[:3], torch.float32)
    assert found.square - found.kept == pytest.approx(float(values[3:].square().sum()), rel=1e-4)


def test_more_ranks_than_the_layer_has(tmp_path: Path) -> None:
    given = terms(tmp_path, [8] * 12)  # 96 in all, at 24 x 40
    found = refactor(given, LAYER, rank=96)
    assert found.a.shape == (24, 40)
    assert_close_rms(found.b @ found.a, dense(given), torch.float32)


@pytest.mark.parametrize("rank", [1, 4, 24])
def test_the_iteration_keeps_what_the_exact_way_keeps(tmp_path: Path, rank: int) -> None:
    given = terms(tmp_path, [8] * 12, outputs=60, inputs=80)
    exact, iterated = (refactor(given, LAYER, rank, exact_rank=limit) for limit in (1000, 95))
    assert exact.exact and not iterated.exact
    assert iterated.kept == pytest.approx(exact.kept, rel=1e-3) and iterated.kept < exact.kept * (1 + 1e-5)
    # What it says it keeps, it does: the error is what it says, but for the estimate of the norm.
    left = dense(given) - iterated.b.double() @ iterated.a.double()
    assert float(left.square().sum()) == pytest.approx(exact.square - iterated.kept, rel=1e-3)
    assert iterated.square == pytest.approx(exact.square, rel=0.25)


def test_no_product_of_the_size_of_the_layer_is_formed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = terms(tmp_path, [4] * 8, outputs=200, inputs=300)
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for each in out if isinstance(out, tuple) else (out,):
                if isinstance(each, Tensor):
                    Sizes.largest = max(Sizes.largest, each.numel())
            return out

    for limit, bound in ((1000, 32 * 300), (8, 20 * 300)):
        Sizes.largest = 0
        with Sizes():
            refactor(given, LAYER, rank=4, exact_rank=limit)
        assert 0 < Sizes.largest <= bound < 200 * 300


def test_an_adapter_that_lacks_the_layer_adds_nothing(tmp_path: Path) -> None:
    given = terms(tmp_path)
    other = write_adapter(tmp_path / "other", layers={"layers.0.k": (3, 4)})
    found = refactor([Term(open_adapter(other), 9.0), *given], LAYER, rank=10)
    assert_close_rms(found.b @ found.a, dense(given), torch.float32)


def test_rows_without_a_value_can_still_be_trained(tmp_path: Path) -> None:
    """Two equal adapters have rank 2 together: the other rows of A are kept, those of B are zero."""
    path = write_adapter(tmp_path / "a", 2, layers={LAYER: (24, 40)})
    adapter = open_adapter(path)
    found = refactor([Term(adapter, 0.5), Term(adapter, 0.5)], LAYER, rank=4)
    assert_close_rms(found.b @ found.a, dense([Term(adapter, 1.0)]), torch.float32)
    assert found.b[:, 2:].abs().max() < 1e-3 * found.b.abs().max()
    assert (found.a.norm(dim=1) > 1e-4 * found.a.norm(dim=1).max()).all()
