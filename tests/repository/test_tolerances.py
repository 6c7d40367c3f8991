"""The comparison helper itself can fail."""

import pytest
import torch

from tolerances import TOLERANCES, Tolerance, assert_close_rms


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_bounds_are_sharp_on_both_sides(dtype: torch.dtype) -> None:
    expected = torch.randn(64, 64, dtype=torch.float64)
    expected /= expected.square().mean().sqrt()
    bounds = TOLERANCES[dtype]

    spike = torch.zeros_like(expected)
    spike[3, 5] = bounds.max
    assert_close_rms(expected + 0.9 * spike, expected, dtype)
    with pytest.raises(AssertionError, match=r"at \(3, 5\)"):
        assert_close_rms(expected + 1.1 * spike, expected, dtype)

    assert_close_rms(expected + 0.9 * bounds.rms, expected, dtype)
    with pytest.raises(AssertionError, match="rms"):
        assert_close_rms(expected + 1.1 * bounds.rms, expected, dtype)


def test_scale_does_not_matter() -> None:
    expected = torch.randn(100, dtype=torch.float64)
    for scale in (1e-12, 1.0, 1e12):
        assert_close_rms(expected * scale * (1 + 1e-6), expected * scale, torch.float32)
        with pytest.raises(AssertionError):
            assert_close_rms(expected * scale * (1 + 1e-3), expected * scale, torch.float32)


def test_zero_reference_asks_for_exact_zeros() -> None:
    assert_close_rms(torch.zeros(3), torch.zeros(3))
    with pytest.raises(AssertionError, match="expected zeros"):
        assert_close_rms(torch.full((3,), 1e-30), torch.zeros(3))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_fail_even_when_both_agree(value: float) -> None:
    tensor = torch.tensor([1.0, value])
    with pytest.raises(AssertionError, match="1 of 2 actual values are not finite"):
        assert_close_rms(tensor, tensor)


def test_shapes_are_not_broadcast() -> None:
    with pytest.raises(AssertionError, match="shape"):
        assert_close_rms(torch.ones(1), torch.ones(3))


def test_default_dtype_is_that_of_the_actual_tensor_and_can_be_overridden() -> None:
    expected = torch.ones(8, dtype=torch.float64)
    assert_close_rms((expected + 1e-5).float(), expected)
    with pytest.raises(AssertionError):
        assert_close_rms(expected + 1e-5, expected)
    assert_close_rms(expected + 1e-5, expected, tolerance=Tolerance(max=1e-4, rms=1e-4, why="wide on purpose"))
