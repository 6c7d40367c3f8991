"""Run Triton kernels under the interpreter, which must be chosen before Triton is imported: a program of its own.

Each case prints a line `ok NAME` or `FAILED NAME: reason`; `test_triton_kernels.py` starts this file and reads them.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterator

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from sparse_compile.kernels.gathered_linear import gathered_input_linear, gathered_linear, reference
from sparse_compile.kernels.gathered_linear import triton as provider
from sparse_compile.kernels.gathered_linear.tiles import Tile
from sparse_compile.kernels.masked_linear import masked_linear, masked_weight
from sparse_compile.kernels.masked_linear.reference import exact_gradients
from tolerances import assert_close_rms

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = (
    # tokens, in, out, kept
    (33, 65, 47, 13),
    (1, 16, 16, 16),
    (5, 7, 9, 1),
    (0, 7, 9, 3),
    (40, 1, 19, 17),
    (130, 20, 70, 33),
)


def drawn(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def chosen(total: int, kept: int) -> Tensor:
    return torch.randperm(total, generator=torch.Generator().manual_seed(3))[:kept].sort().values


def products(dtype: torch.dtype, shape: tuple[int, ...], strided: bool) -> None:
    """Forward and backward of both ops, through their autograd formulas, against fp64."""
    tokens, width, out, kept = shape
    weight = drawn(width, out, seed=1, dtype=dtype).t() if strided else drawn(out, width, seed=1, dtype=dtype)
    for op, plain, columns, total in (
        (gathered_linear, reference.gathered_linear, width, out),
        (gathered_input_linear, reference.gathered_input_linear, min(kept, width), width),
    ):
        channels = chosen(total, min(kept, total))
        x = drawn(columns, tokens, seed=2, dtype=dtype).t() if strided else drawn(tokens, columns, seed=2, dtype=dtype)
        wide = x.double().requires_grad_()
        x = x.requires_grad_()
        y, expected = op(x, weight, channels, "triton"), plain(wide, weight.double(), channels)
        assert y.dtype == dtype
        assert_close_rms(y, expected, name=f"{op._name} forward")
        d_y = drawn(*y.shape, seed=4, dtype=dtype)
        (d_x,) = torch.autograd.grad(y, x, d_y)
        (wanted,) = torch.autograd.grad(expected, wide, d_y.double())
        assert_close_rms(d_x, wanted, name=f"{op._name} backward")


def other_weight_dtype() -> None:
    """fp32 weights under bf16 activations, cast as they are loaded."""
    x, weight = drawn(9, 20, seed=0, dtype=torch.bfloat16), drawn(11, 20, seed=1, dtype=torch.float32)
    channels = chosen(11, 5)
    y = gathered_linear(x, weight, channels, "triton")
    assert y.dtype == torch.bfloat16
    assert_close_rms(y, reference.gathered_linear(x.double(), weight.bfloat16().double(), channels))


def in_kernel_index_loads() -> None:
    """A scattered slice is indexed in the kernel as well where a tile says so, over several tiles and groups."""
    x, weight = drawn(70, 40, seed=0, dtype=torch.float32), drawn(50, 90, seed=1, dtype=torch.float32)
    channels = chosen(90, 40)
    y = x.new_empty(70, 50)
    provider.launch(x, weight, channels, y, "depth", Tile(16, 16, 16, 4, 2, group=2))
    assert_close_rms(y, reference.gathered_input_linear(x.double(), weight.double(), channels))


MASKED_SHAPES = (
    # tokens, in, out, rank
    (33, 65, 47, 5),
    (1, 16, 16, 16),
    (5, 7, 9, 1),
    (0, 7, 9, 3),
    (70, 40, 130, 20),
)


def masked(dtype: torch.dtype, adapters: torch.dtype, shape: tuple[int, ...], strided: bool) -> None:
    """Forward and both gradients, through the autograd formula, against fp64 on the weight as it is rounded."""
    tokens, width, out, rank = shape
    weight = drawn(width, out, seed=1, dtype=dtype).t() if strided else drawn(out, width, seed=1, dtype=dtype)
    weight[torch.rand(out, width, generator=torch.Generator().manual_seed(5)) < 0.5] = 0
    a, b = drawn(rank, width, seed=6, dtype=adapters), drawn(out, rank, seed=7, dtype=adapters)
    bias = None if strided else drawn(out, seed=8, dtype=dtype)
    x = drawn(width, tokens, seed=2, dtype=dtype).t() if strided else drawn(tokens, width, seed=2, dtype=dtype)
    x, a, b = (each.requires_grad_() for each in (x, a, b))
    y = masked_linear(x, weight, a, b, bias, 0.75, "exact", "triton")
    assert y.dtype == dtype
    d_y = drawn(*y.shape, seed=4, dtype=dtype)
    wide = [None if each is None else each.detach().double() for each in (weight, a, b, bias)]
    merged = masked_weight(weight, a, b, 0.75, dtype).detach().double()
    expected = torch.nn.functional.linear(x.detach().double(), merged, wide[3])
    assert_close_rms(y, expected, name="forward")
    d_x, d_a, d_b = torch.autograd.grad(y, (x, a, b), d_y)
    assert_close_rms(d_x, d_y.double() @ merged, name="input gradient")
    for found, want in zip(
        (d_a, d_b), exact_gradients(d_y.double(), x.detach().double(), *wide[:3], 0.75), strict=True
    ):
        assert_close_rms(found, want, dtype, name="adapter gradient")


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    for dtype, shape, strided in itertools.product(DTYPES, SHAPES, (False, True)):
        name = f"products {str(dtype)[6:]} {'x'.join(map(str, shape))}{' strided' if strided else ''}"
        yield name, lambda dtype=dtype, shape=shape, strided=strided: products(dtype, shape, strided)
    pairs = ((torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16))
    for (dtype, adapters), shape in itertools.product(pairs, MASKED_SHAPES):
        for strided in (False, True)[: 2 if dtype == torch.float32 else 1]:
            name = f"masked {dtype} {adapters} {'x'.join(map(str, shape))}{' strided' if strided else ''}"
            yield name, lambda d=dtype, a=adapters, s=shape, strided=strided: masked(d, a, s, strided)
    for case in (other_weight_dtype, in_kernel_index_loads):
        yield case.__name__, case


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, case in cases():
        try:
            case()
        except Exception as error:
            print(f"FAILED {name}: {type(error).__name__}: {error}".replace("\n", " "), flush=True)  # noqa: T201
        else:
            print(f"ok {name}", flush=True)  # noqa: T201
    sys.exit(0)
