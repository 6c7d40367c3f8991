"""The one table of numerical tolerances of the suite, and the comparison that uses it.

Errors are taken relative to the root mean square (RMS) of the expected tensor. An elementwise relative error says
nothing where sums cancel to nearly zero, and an absolute one depends on the scale of the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """Bounds on an error, both in units of the RMS of the expected tensor.

    Attributes:
        max: Bound on the largest absolute error of an element.
        rms: Bound on the root mean square of the errors.
        why: Where the two bounds come from.
    """

    max: float
    rms: float
    why: str


TOLERANCES: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(
        max=1e-9,
        rms=1e-10,
        why="Unit roundoff 1.1e-16: a reordered sum of 4096 terms errs by about 1e-14, so a thousandfold margin for "
        "depth still tells a wrong formula from rounding.",
    ),
    torch.float32: Tolerance(
        max=1e-4,
        rms=2e-5,
        why="Unit roundoff 6e-8: a reordered sum of 4096 terms errs by sqrt(4096) * 6e-8 = 4e-6, and ten such "
        "products in a row by sqrt(10) times that; the largest of a million errors is about five times their RMS.",
    ),
    torch.float16: Tolerance(
        max=1e-2,
        rms=2e-3,
        why="Unit roundoff 4.9e-4: sums accumulate in fp32, so each operator rounds once; ten roundings in a row give "
        "sqrt(10) * 4.9e-4 = 1.5e-3, and an element of five RMS carries five times that.",
    ),
    torch.bfloat16: Tolerance(
        max=8e-2,
        rms=1.5e-2,
        why="Unit roundoff 3.9e-3, eight times that of fp16, under the same reasoning.",
    ),
}


def assert_close_rms(
    actual: Tensor,
    expected: Tensor,
    dtype: torch.dtype | None = None,
    *,
    tolerance: Tolerance | None = None,
    name: str = "tensor",
) -> None:
    """Assert that two tensors agree to the tolerance of a dtype, relative to the RMS of the expected one.

    Args:
        actual: Tensor under test, of any shape.
        expected: Reference of the same shape; its dtype may be wider. An all-zero reference asks for exact zeros.
        dtype: Precision that the computation of `actual` ran in; `actual.dtype` where not given.
        tolerance: Bounds in place of the table's row. State the reason beside the call.
        name: What to call the tensor in the message of a failure.

    Raises:
        AssertionError: If shapes differ, a value is not finite, or an error exceeds its bound.
    """
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if actual.numel() == 0:
        return
    bounds = tolerance or TOLERANCES[dtype or actual.dtype]
    got, want = (tensor.detach().to("cpu", torch.float64) for tensor in (actual, expected))
    for label, tensor in (("actual", got), ("expected", want)):
        bad = int((~tensor.isfinite()).sum())
        assert bad == 0, f"{name}: {bad} of {tensor.numel()} {label} values are not finite"
    error = (got - want).abs()
    scale = want.square().mean().sqrt().item()
    if scale == 0.0:
        assert error.max().item() == 0.0, f"{name}: expected zeros, got values up to {error.max().item():.3e}"
        return
    worst = error.max().item() / scale
    rms = error.square().mean().sqrt().item() / scale
    where = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    assert worst <= bounds.max and rms <= bounds.rms, (
        f"{name}: error relative to the RMS {scale:.3e}: max {worst:.3e} (bound {bounds.max:.1e}) at {where}, "
        f"rms {rms:.3e} (bound {bounds.rms:.1e})"
    )
