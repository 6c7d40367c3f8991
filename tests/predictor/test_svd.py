"""The factors of one weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from predictor_weights import DTYPES, identical, low_rank_weight, product, random_weight
from sparse_compile.predictor import svd
from sparse_compile.predictor.svd import LowRankFactors, NonFiniteWeight, factorize
from tolerances import assert_close_rms


class TestFactorize:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("rank", [1, 5, 8])
    @pytest.mark.parametrize("shape", [(48, 80), (80, 48), (300, 20)])
    def test_a_weight_of_low_rank_is_reproduced(self, dtype: torch.dtype, rank: int, shape: tuple[int, int]) -> None:
        weight = low_rank_weight(*shape, rank=rank, dtype=dtype)
        found = factorize(weight, rank=8, seed=0)
        assert (found.a.shape, found.b.shape) == ((shape[1], 8), (8, shape[0]))
        assert found.a.dtype == found.b.dtype == dtype
        assert_close_rms(product(found), weight, dtype)

    @pytest.mark.parametrize("scale", [1e-12, 1e12])
    def test_small_components_of_a_low_rank_weight_survive(self, scale: float) -> None:
        left = torch.linalg.qr(random_weight(64, 8, dtype=torch.float64)).Q
        right = torch.linalg.qr(random_weight(96, 8, dtype=torch.float64, seed=1)).Q
        values = torch.logspace(0, -5, 8, dtype=torch.float64) * scale
        found = factorize((left * values) @ right.mT, rank=8, seed=0)
        torch.testing.assert_close(found.a.norm(dim=0) ** 2, values, rtol=1e-9, atol=0)

    @pytest.mark.parametrize("shape", [(3, 40), (40, 3), (1, 1), (8, 8)])
    def test_a_small_weight_is_reproduced_with_as_many_components_as_it_has(self, shape: tuple[int, int]) -> None:
        weight = random_weight(*shape)
        found = factorize(weight, rank=8, seed=0)
        assert found.rank == min(shape)
        assert_close_rms(product(found), weight)

    def test_components_are_those_of_the_full_svd(self) -> None:
        weight = random_weight(256, 128, dtype=torch.float64)
        left, values, right = torch.linalg.svd(weight.mT, full_matrices=False)
        # A spectrum that falls, so that the components are well separated.
        values = torch.arange(1, 129, dtype=torch.float64) ** -0.7
        found = factorize(((left * values) @ right).mT, rank=8, seed=0)
        singular = found.a.norm(dim=0) ** 2
        torch.testing.assert_close(singular, values[:8], rtol=1e-3, atol=0)
        torch.testing.assert_close(found.b.norm(dim=1) ** 2, singular)
        overlap = ((found.a / found.a.norm(dim=0)).mT @ left[:, :8]).diagonal().abs()
        assert overlap.min() > 0.99

    def test_approximation_is_nearly_the_best_of_its_rank(self) -> None:
        weight = random_weight(200, 100)  # a flat spectrum is the hardest
        values = torch.linalg.svdvals(weight)
        error = (product(factorize(weight, rank=8, seed=0)) - weight).norm()
        assert error <= 1.01 * values[8:].norm()

    def test_zero_weight(self) -> None:
        found = factorize(torch.zeros(32, 64), rank=8, seed=0)
        assert not product(found).any()
        assert found.a.isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_16_bit_weight_equals_its_wide_copy(self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        # Blocks of 7 rows: several, the last of them shorter.
        monkeypatch.setattr(svd, "_BLOCK_ELEMENTS", 7 * 96)
        weight = low_rank_weight(65, 96, rank=40, dtype=dtype)
        found = factorize(weight, rank=8, seed=0)
        assert found.a.dtype == torch.float32
        assert_close_rms(product(found), product(factorize(weight.float(), rank=8, seed=0)))

    def test_strides_and_gradients_do_not_matter(self) -> None:
        weight = random_weight(64, 48)
        found = factorize(nn.Parameter(weight.mT.contiguous().mT), rank=8, seed=0)
        assert not found.a.requires_grad
        assert found.b.is_contiguous()
        assert_close_rms(product(found), product(factorize(weight, rank=8, seed=0)))

    def test_same_seed_same_factors_and_the_global_generator_rests(self) -> None:
        weight = random_weight(64, 96)
        state = torch.get_rng_state()
        first = factorize(weight, rank=8, seed=3)
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(5)
        assert identical(first, factorize(weight, rank=8, seed=3))
        assert not identical(first, factorize(weight, rank=8, seed=4))

    def test_sign_does_not_depend_on_the_seed(self) -> None:
        weight = low_rank_weight(64, 96, rank=4, dtype=torch.float64)
        first, second = (factorize(weight, rank=4, seed=seed) for seed in (0, 1))
        assert_close_rms(first.a, second.a)
        assert_close_rms(first.b, second.b)

    def test_settings_of_the_caller_neither_matter_nor_change(self) -> None:
        weight = low_rank_weight(64, 96, rank=8, dtype=torch.float32)
        expected = factorize(weight, rank=8, seed=0)
        precision = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("medium")
            with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
                found = factorize(weight, rank=8, seed=0)
            assert torch.get_float32_matmul_precision() == "medium"
        finally:
            torch.set_float32_matmul_precision(precision)
        assert identical(found, expected)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_one_value_that_is_not_finite_is_found(self, dtype: torch.dtype, value: float) -> None:
        weight = random_weight(33, 47, dtype=dtype)
        weight[17, 5] = value
        with pytest.raises(NonFiniteWeight):
            factorize(weight, rank=8, seed=0)

    def test_overflow_is_not_handed_on(self) -> None:
        with pytest.raises(NonFiniteWeight, match="overflow"):
            factorize(torch.full((64, 64), 3e38), rank=8, seed=0)

    @pytest.mark.parametrize(
        ("weight", "message"),
        [
            (torch.empty(4, 4, device="meta"), "no data"),
            (torch.zeros(4), "shape"),
            (torch.zeros(2, 3, 4), "shape"),
            (torch.zeros(0, 4), "shape"),
            (torch.zeros(4, 4, dtype=torch.uint8), "dequantise"),
        ],
    )
    def test_what_has_no_factors(self, weight: Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            factorize(weight, rank=8, seed=0)

    def test_fake_weight(self) -> None:
        fake = FakeTensorMode().from_tensor(torch.zeros(4, 4))
        with pytest.raises(ValueError, match="no data"):
            factorize(fake, rank=8, seed=0)


def test_factors_must_fit_each_other() -> None:
    with pytest.raises(ValueError, match=r"\(4, 2\) and \(3, 5\)"):
        LowRankFactors(torch.ones(4, 2), torch.ones(3, 5))
