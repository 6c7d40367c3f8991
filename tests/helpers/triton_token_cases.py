"""Choice of channels, predicted norms and the split of tokens under the interpreter: cases of `triton_cases.py`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from sparse_compile.kernels.channel_selection import predicted_norms, predicted_scores
from sparse_compile.kernels.channel_selection import triton as provider
from sparse_compile.kernels.channel_selection.reference import predicted_norms as plain_norms
from sparse_compile.kernels.channel_selection.reference import predicted_scores as plain_scores
from sparse_compile.kernels.channel_selection.reference import top_channels as plain_top_channels
from sparse_compile.kernels.channel_selection.triton_scores import score_sizes
from sparse_compile.kernels.token_rows import put_rows, take_rows
from sparse_compile.kernels.token_rows import reference as plain_rows
from tolerances import assert_close_rms
from triton_operands import drawn


def largest(n: int, k: int) -> None:
    """The choice of channels: ties, zeros of either sign, denormal and huge scores; several chunks of scores."""
    generator = torch.Generator().manual_seed(n)
    drawn_scores = torch.randn(n, generator=generator).abs()
    rounded = drawn_scores.mul(3).round()
    extremes = drawn_scores.clone()
    extremes[::3], extremes[1::3] = 1e-42, 3e38
    for scores in (drawn_scores, rounded, extremes, torch.ones(n), torch.cat([-torch.zeros(n - 1), torch.ones(1)])):
        found, informative = provider.top_channels(scores, k)
        expected, useful = plain_top_channels(scores, k)
        assert torch.equal(found, expected) and found.dtype == torch.int64
        assert bool(informative) == bool(useful) is True
    for bad in (torch.zeros(n), rounded.index_fill(0, torch.tensor([n // 2]), float("nan")), rounded / 0):
        found, informative = provider.top_channels(bad, k)
        assert found.tolist() == list(range(k)) and not informative


NORM_SHAPES = (
    # rows, in, rank, out
    (70, 65, 8, 143),
    (1, 1, 1, 1),
    (0, 7, 3, 5),
    (33, 130, 31, 64),
    (600, 20, 63, 70),
)


def norms(dtype: torch.dtype, shape: tuple[int, ...], biased: bool, strided: bool) -> None:
    """Predicted norms against fp64, and every bit of them again in another run."""
    rows, width, rank, out = shape
    x = drawn(width, rows, seed=0, dtype=dtype).t() if strided else drawn(rows, width, seed=0, dtype=dtype)
    a, b = drawn(width, rank, seed=1, dtype=torch.float32), drawn(rank, out, seed=2, dtype=torch.float32)
    if strided:
        a, b = a.t().contiguous().t(), b.t().contiguous().t()
    bias = drawn(out, seed=3, dtype=dtype).mul(width**0.5) if biased else None
    counted = torch.rand(rows, generator=torch.Generator().manual_seed(4)) < 0.7
    found = predicted_norms(x, counted, a, b, bias, "triton")
    wide = [None if each is None else each.double() for each in (x, a, b, bias)]
    expected = plain_norms(wide[0], counted, *wide[1:])
    assert found.dtype == torch.float32
    assert_close_rms(found, expected, torch.float32)
    assert torch.equal(found, predicted_norms(x, counted.float(), a, b, bias, "triton"))
    assert not predicted_norms(x, torch.zeros_like(counted), a, b, bias, "triton").any()


def norms_that_are_not_finite() -> None:
    """As in the reference: of one token that is not finite every score is none, counted or not; sums that overflow."""
    a, b = drawn(6, 3, seed=1, dtype=torch.float32).abs(), drawn(3, 9, seed=2, dtype=torch.float32).abs()
    bias = torch.ones(9)
    for value in (float("nan"), float("inf"), 1e30):
        for counts in (True, False):
            for given in (None, bias):
                x, counted = torch.ones(40, 6), torch.ones(40, dtype=torch.bool)
                x[35, 2], counted[35] = value, counts
                found, expected = (predicted_norms(x, counted, a, b, given, name) for name in ("triton", "reference"))
                assert torch.equal(found.isfinite(), expected.isfinite()), (value, counts)
                chosen_by = [plain_top_channels(each, 4) for each in (found, expected)]
                assert torch.equal(chosen_by[0][0], chosen_by[1][0])
                assert bool(chosen_by[0][1]) == bool(chosen_by[1][1]) == (value == 1e30 and not counts)


SCORE_FORMULAS = {
    # formula, vectors: "wide" of one value a channel, "one" of one in all
    "swiglu": ("p0*p1*sigmoid(p0)", ()),
    "geglu erf, biases": ("(p0 + v0)*(p1 + v1)*(1 + erf(0.7071067811865476*(p0 + v0)))/2", ("wide", "wide")),
    "relu squared, bias": ("v1*select(p0 + v0, p0 + v0, 0)**2", ("wide", "one")),
    "constant": ("3", ()),
}
SCORE_SHAPES = (
    # rows, in, ranks, out
    (70, 65, (8, 3), 143),
    (0, 7, (3, 3), 5),
    (1, 1, (1, 1), 1),
    (33, 1100, (63, 16), 70),
)


def scores(dtype: torch.dtype, shape: tuple[int, int, tuple[int, ...], int], formula: str, strided: bool) -> None:
    """Scores of a block against fp64, and every bit of them again in another run."""
    rows, width, ranks, out = shape
    text, kinds = SCORE_FORMULAS[formula]
    x = drawn(width, rows, seed=0, dtype=dtype).t() if strided else drawn(rows, width, seed=0, dtype=dtype)
    # Predictions of unit variance: bounds are relative to the result.
    a = [drawn(width, rank, seed=1 + i, dtype=torch.float32) / width**0.5 for i, rank in enumerate(ranks)]
    b = [drawn(rank, out, seed=5 + i, dtype=torch.float32) / rank**0.5 for i, rank in enumerate(ranks)]
    if strided:
        a, b = ([each.t().contiguous().t() for each in group] for group in (a, b))
    vectors = [drawn(out if kind == "wide" else 1, seed=9, dtype=dtype).squeeze() for kind in kinds]
    counted = torch.rand(rows, generator=torch.Generator().manual_seed(4)) < 0.7
    found = predicted_scores(x, counted, a, b, vectors, text, "triton")
    wide = [[each.double() for each in group] for group in (a, b, vectors)]
    assert found.dtype == torch.float32
    assert_close_rms(found, plain_scores(x.double(), counted, *wide, text), torch.float32)
    assert torch.equal(found, predicted_scores(x, counted, a, b, vectors, text, "triton"))
    assert not predicted_scores(x, torch.zeros_like(counted), a, b, vectors, text, "triton").any()


def scores_that_are_not_finite() -> None:
    """As in the reference: a token that does not count is not read; what pads rows and ranks adds nothing."""
    a = [drawn(6, 3, seed=i, dtype=torch.float32).abs() for i in (1, 2)]
    b = [drawn(3, 9, seed=i, dtype=torch.float32).abs() for i in (3, 4)]
    for text, value, counts in itertools.product(
        ("p0*p1*sigmoid(p0)", "select(p0, p0, 0)**2", "1/p0"),
        (float("nan"), float("inf"), -float("inf")),
        (True, False),
    ):
        x, counted = torch.ones(40, 6), torch.ones(40, dtype=torch.bool)
        x[35], counted[35] = value, counts
        found, expected = (predicted_scores(x, counted, a, b, [], text, name) for name in ("triton", "reference"))
        assert torch.equal(found.isnan(), expected.isnan()), (text, value, counts)
        assert torch.equal(found.isinf(), expected.isinf()), (text, value, counts)
        assert counts or bool(found.isfinite().all())


def shares_of_the_depth() -> None:
    """Few rows are cut along the depth, within bounds; many are not."""
    assert (score_sizes(64, 4096, (8, 8)).parts, score_sizes(64, 4096, (8, 8)).share) == (8, 512)
    assert score_sizes(64, 14336, (8,)).parts == 16 and score_sizes(4096, 4096, (8,)).parts == 1
    assert score_sizes(33, 1100, (63, 16)).parts == 2
    for rows, depth in itertools.product((0, 1, 64, 4096), (1, 63, 64, 511, 1100, 4097)):
        sizes = score_sizes(rows, depth, (8,))
        assert sizes.share % sizes.k == 0 and (sizes.parts - 1) * sizes.share < depth <= sizes.parts * sizes.share


def rows_by_role(dtype: torch.dtype, tokens_: int, width: int, kept: int | None, strided: bool) -> None:
    """Split and merge, forward and backward: copies, so equal to the last bit. Without and with spare slots."""
    mask = torch.rand(tokens_, generator=torch.Generator().manual_seed(5)) < 0.4
    split = plain_rows.split_tokens(mask)
    _copies_of_rows(dtype, split, tokens_, None, width, kept, strided)
    if tokens_ and not strided:
        slots = plain_rows.token_slots(mask, len(split[0]) + 2, len(split[1]) + 3)
        _copies_of_rows(dtype, slots, tokens_, tokens_, width, kept, strided)


def _copies_of_rows(
    dtype: torch.dtype,
    rows: tuple[Tensor, Tensor],
    tokens_: int,
    slots_of: int | None,
    width: int,
    kept: int | None,
    strided: bool,
) -> None:
    output_rows, context_rows = rows
    columns = None if kept is None else torch.randperm(width, generator=torch.Generator().manual_seed(6))[:kept]

    def given(*shape: int, seed: int) -> Tensor:
        return drawn(*shape[::-1], seed=seed, dtype=dtype).t() if strided else drawn(*shape, seed=seed, dtype=dtype)

    x = given(tokens_, width, seed=0).requires_grad_()
    outputs, contexts = given(len(output_rows), width, seed=1), given(len(context_rows), kept or width, seed=2)
    for op, operands in ((take_rows, (x,)), (put_rows, (outputs.requires_grad_(), contexts.requires_grad_()))):
        found = op(*operands, output_rows, context_rows, columns, "triton", slots_of)
        expected = op(*operands, output_rows, context_rows, columns, tokens=slots_of)
        pairs = zip(*((each,) if isinstance(each, Tensor) else each for each in (found, expected)), strict=True)
        for one, other in pairs:
            assert torch.equal(one, other) and one.stride() == other.stride()
            d = drawn(*one.shape, seed=7, dtype=dtype)
            gradients = [
                torch.autograd.grad(each, operands, d, retain_graph=True, allow_unused=True) for each in (one, other)
            ]
            for mine, plain in zip(*gradients, strict=True):
                assert torch.equal(mine, plain)


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    for n, k in ((1, 1), (7, 3), (16, 16), (143, 1), (1000, 999), (20000, 200)):
        yield f"largest {k} of {n}", partial(largest, n, k)
    for dtype, shape, biased in itertools.product((torch.float32, torch.bfloat16), NORM_SHAPES, (False, True)):
        name = f"norms {str(dtype)[6:]} {'x'.join(map(str, shape))}{' bias' if biased else ''}"
        yield name, partial(norms, dtype, shape, biased, strided=biased)
    for dtype, (tokens_, width, kept), strided in itertools.product(
        (torch.float32, torch.bfloat16),
        ((9, 33, None), (9, 33, 5), (1, 1, 1), (0, 4, 2), (3, 2500, 2100)),
        (False, True),
    ):
        name = f"rows {str(dtype)[6:]} {tokens_}x{width} {kept}{' strided' if strided else ''}"
        yield name, partial(rows_by_role, dtype, tokens_, width, kept, strided)
    for name, shape in itertools.product(SCORE_FORMULAS, SCORE_SHAPES):
        dtype = torch.float32 if shape[0] != 70 else torch.bfloat16
        sizes = "x".join(map(str, (shape[0], shape[1], *shape[2], shape[3])))
        yield f"scores {name} {sizes}", partial(scores, dtype, shape, name, strided=shape[0] == 33)
    for case in (norms_that_are_not_finite, scores_that_are_not_finite, shares_of_the_depth):
        yield case.__name__, case
