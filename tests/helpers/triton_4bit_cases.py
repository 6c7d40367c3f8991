"""Products with weights in 4 bits under the interpreter: cases of `triton_cases.py`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from bitsandbytes.functional import quantize_4bit
from torch import Tensor

from sparse_compile.kernels.dequantize_4bit.packed import PackedFormat, PackedWeight, code_values
from sparse_compile.kernels.fused_linear import fused_linear
from tolerances import assert_close_rms
from triton_operands import DTYPES, chosen, drawn


def packed_weight(rows: int, width: int, quant_type: str, blocksize: int, nested: bool, seed: int) -> PackedWeight:
    """A weight of unit variance along a row, as bitsandbytes stores it."""
    weight = drawn(rows, width, seed=seed, dtype=torch.float32).div(width**0.5)
    data, state = quantize_4bit(weight, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type)
    own = (state.state2.absmax, (state.absmax, state.state2.code, state.offset)) if nested else (state.absmax, ())
    return PackedWeight(data, *own, PackedFormat(quant_type, blocksize, rows, width, nested))


FOUR_BIT = (
    # tokens, in, out, kept, blocksize, nested, type: rows of one block, of several, within one, a short last block
    (33, 64, 47, 13, 64, False, "nf4"),
    (33, 256, 300, 13, 32, True, "nf4"),
    (3, 128, 16, 16, 128, True, "fp4"),
    (130, 96, 70, 33, 64, False, "nf4"),
    (20, 50, 23, 7, 64, True, "fp4"),
    (9, 64, 9, 1, 4096, False, "fp4"),
    (0, 64, 9, 3, 64, True, "nf4"),
)


def four_bit(dtype: torch.dtype, shape: tuple[int, ...], quantised: tuple[int, bool, str], dim: int = 0) -> None:
    """Forward and gradients of products with weights in 4 bits, one of them beside a dense one, against fp64."""
    tokens, width, out, kept = shape
    blocksize, nested, quant_type = quantised
    packed = [packed_weight(out, width, quant_type, blocksize, nested, seed) for seed in (1, 2)]
    other = drawn(out, width, seed=3, dtype=dtype)
    channels = chosen((out, width)[dim], kept)
    columns, depth = (kept, width) if dim == 0 else (out, kept)
    dense = [flat_dequantised(each).to(dtype).double() for each in packed] + [other.double()]
    scales = [scale for each in packed for scale in (each.absmax, *each.nested)]
    formats = ";".join([*(each.format.text for each in packed), ""])
    leaves = [drawn(tokens, depth, seed=10, dtype=dtype), drawn(tokens, 5, seed=11, dtype=dtype)]
    leaves.append(drawn(columns, 5, seed=12, dtype=torch.float32).div(5**0.5).to(dtype))
    formula = "(p0 + t0)*sigmoid(p0 + t0)*p1 + p2" if dim == 0 else "p0 + p1 + p2 + 0.5*t0"

    def run(wide: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        x, thin, factor = (each.to(torch.float64 if wide else dtype).requires_grad_() for each in leaves)
        weights = dense if wide else [*(each.data for each in packed), other]
        (y, *_) = fused_linear(
            [x], weights, [channels] * 3, [0] * 3, [dim] * 3, [thin], [factor], [], formula, x.dtype,
            [] if wide else scales, "" if wide else formats, "reference" if wide else "triton",
        )  # fmt: skip
        d_y = drawn(*y.shape, seed=4, dtype=dtype).to(y.dtype)
        return y, torch.autograd.grad(y, (x, thin, factor), d_y)

    (y, found), (expected, wanted) = run(False), run(True)
    assert_close_rms(y, expected, name="forward")
    for index, (gradient, reference_) in enumerate(zip(found, wanted, strict=True)):
        assert_close_rms(gradient, reference_, dtype, name=f"gradient {index}")


def flat_dequantised(weight: PackedWeight) -> Tensor:
    """The whole weight, by the loops that the format is told in."""
    form, table = weight.format, code_values(weight.format.quant_type, torch.device("cpu"))
    halves = torch.stack([weight.bytes >> 4, weight.bytes & 15], dim=1).reshape(-1).int()
    absmax = weight.absmax
    if weight.nested:
        quantised, code, offset = weight.nested
        absmax = code[quantised.int()] * absmax.repeat_interleave(256)[: quantised.numel()] + offset
    total = form.rows * form.width
    return (table[halves[:total]] * absmax.repeat_interleave(form.blocksize)[:total]).view(form.rows, form.width)


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    for dtype, (*shape, blocksize, nested, kind) in itertools.product(DTYPES, FOUR_BIT):
        for dim in (0, 1)[: 2 if dtype == torch.float32 else 1]:
            name = f"4 bits {str(dtype)[6:]} {'x'.join(map(str, shape))} {blocksize} {kind} along {dim}"
            yield name, partial(four_bit, dtype, tuple(shape), (blocksize, nested, kind), dim)
