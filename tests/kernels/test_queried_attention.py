"""Attention of some queries: that of PyTorch at these queries, zeros at all others, with its gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import sparse_compile.kernels  # noqa: F401 - registers torch.ops.sparselora
from models import normal
from sparse_compile.kernels.providers import REFERENCE, OpCall
from sparse_compile.kernels.queried_attention import QUERIED_ATTENTION, QUERIED_ATTENTION_BACKWARD
from sweeps import slow, sweep
from tolerances import TOLERANCES, Tolerance, assert_close_rms

OPS = torch.ops.sparselora
PROVIDERS = QUERIED_ATTENTION.names
BATCH, HEADS, LENGTH, WIDTH, SCALE = 3, 4, 21, 8, 0.4
FLOATS = (torch.float64, torch.float32, torch.bfloat16)


def some(length: int = LENGTH) -> Tensor:
    """Queries of three sequences: runs of them, none, and scattered ones with the last and the first."""
    wanted = torch.zeros(BATCH, length, dtype=torch.bool)
    wanted[0, length // 3 : length // 2] = wanted[0, -3:] = True
    wanted[2, ::3] = wanted[2, -1] = True
    return wanted


QUERIES: dict[str, Callable[[], Tensor]] = {
    "some": some,
    "all": lambda: torch.ones(BATCH, LENGTH, dtype=torch.bool),
    "none": lambda: torch.zeros(BATCH, LENGTH, dtype=torch.bool),
    "one": lambda: torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) == LENGTH + 5,
}


def allowed(kind: str, length: int = LENGTH) -> Tensor:
    """Return which keys each query may read, (B or 1, H or 1, S, S)."""
    causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    read = causal.repeat(BATCH, 1, 1, 1)
    if kind == "left":
        read[0, :, :, : length // 2] = False  # the first queries of the sequence read no key at all
        read[2, :, :, :4] = False
    elif kind == "right":
        read[0, :, :, length // 3 :] = False
        read[2, :, :, -5:] = False
    elif kind == "heads":
        heads = torch.arange(HEADS)[:, None, None]
        distance = torch.arange(length)[:, None] - torch.arange(length)
        read = causal & (distance[None] <= 3 * heads + 2)  # windows of several widths
    return read


MASKS: dict[str, tuple[Any, bool]] = {
    "nothing": (None, False),
    "causal": (None, True),
    "bool, left padding": (allowed("left"), False),
    "bool, right padding": (allowed("right"), False),
    "bool, one for each head": (allowed("heads"), False),
    "bool, one for all": (allowed("none")[:1], False),
    "bool of no key": (torch.zeros(1, 1, LENGTH, LENGTH, dtype=torch.bool), False),
    "added": (normal(BATCH, HEADS, LENGTH, LENGTH, seed=5), False),
    "added, left padding": (normal(1, 1, LENGTH, LENGTH).where(allowed("left"), float("-inf")), False),
    "added, causal": (normal(BATCH, 1, LENGTH, LENGTH, seed=6), True),
    "bool, causal": (allowed("heads") | torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1), True),
}
"""A mask, and whether no query reads a later key."""


def operands(dtype: torch.dtype, kv_heads: int = HEADS, length: int = LENGTH) -> list[Tensor]:
    """Return query, key and value, as a model's views lay them out."""
    heads = (HEADS, kv_heads, kv_heads)
    drawn = (normal(BATCH, length, each, WIDTH, seed=seed) for seed, each in enumerate(heads))
    return [each.transpose(1, 2).to(dtype).requires_grad_() for each in drawn]


def plain(heads: list[Tensor], wanted: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """Compute attention of all queries, and take what the others found away."""
    length = heads[0].shape[2]
    if is_causal and mask is not None:
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        mask = mask & ~later if mask.dtype == torch.bool else mask.masked_fill(later, float("-inf"))
    elif is_causal:
        mask = torch.ones(length, length, dtype=torch.bool).tril()
    out = scaled_dot_product_attention(*heads, mask, scale=SCALE, enable_gqa=True)
    return out.masked_fill(~wanted[:, None, :, None], 0.0)


def check(
    provider: str,
    dtype: torch.dtype = torch.float64,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    wanted: Tensor | None = None,
    size: int | None = None,
    tolerance: Tolerance | None = None,
    **sizes: int,
) -> None:
    """Compare the result and the gradients with those of plain attention in fp64."""
    heads = operands(dtype, **sizes)
    wide = [each.detach().double().requires_grad_() for each in heads]
    wanted = some(heads[0].shape[2]) if wanted is None else wanted
    given = mask.to(dtype) if mask is not None and mask.is_floating_point() else mask
    slots = OPS.query_slots(wanted, size)
    out, logsumexp = OPS.queried_attention(*heads, given, slots, is_causal, SCALE, provider)
    # What is added is rounded as well: that is the operand, not the computation.
    expected = plain(wide, wanted, given.double() if given is not mask and given is not None else mask, is_causal)
    assert out.dtype == dtype and out.transpose(1, 2).is_contiguous() and not logsumexp.requires_grad
    assert not out.detach().masked_select(~wanted[:, None, :, None]).any()
    assert_close_rms(out, expected, dtype, tolerance=tolerance)
    seed = normal(*out.shape, seed=9)
    found = torch.autograd.grad(out, heads, seed.to(dtype))
    for name, actual, want in zip("qkv", found, torch.autograd.grad(expected, wide, seed), strict=True):
        assert_close_rms(actual, want, dtype, tolerance=tolerance, name=name)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("queries", sweep(QUERIES, "some"))
@pytest.mark.parametrize("kind", MASKS)
def test_it_is_attention_of_these_queries(kind: str, queries: str, provider: str) -> None:
    mask, is_causal = MASKS[kind]
    check(provider, mask=mask, is_causal=is_causal, wanted=QUERIES[queries]())


UNEVEN = {
    dtype: Tolerance(4 * each.max, each.rms, "gradients of the first keys, which all queries read, are many RMS large")
    for dtype, each in TOLERANCES.items()
}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["causal", slow("bool, left padding"), "added, left padding"])
@pytest.mark.parametrize("kv_heads", [slow(1), 2])
def test_every_dtype_and_grouped_heads(kv_heads: int, kind: str, dtype: torch.dtype, provider: str) -> None:
    mask, is_causal = MASKS[kind]
    check(provider, dtype, mask=mask, is_causal=is_causal, kv_heads=kv_heads, tolerance=UNEVEN[dtype])


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", [torch.float64, slow(torch.float32), slow(torch.bfloat16)], ids=str)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_queries_of_several_blocks(padding: str, dtype: torch.dtype, provider: str) -> None:
    """More queries in a sequence than a block holds, each block with keys of its own."""
    length = 160
    wanted = some(length)
    wanted[0, 20:] = True
    mask = allowed(padding, length)
    check(provider, dtype, mask=mask, wanted=wanted, length=length, kv_heads=2, tolerance=UNEVEN[dtype])


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("size", [LENGTH - 1, LENGTH + 6])
def test_spare_slots(size: int, provider: str) -> None:
    check(provider, is_causal=True, size=size)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_queries_that_read_no_key_are_zero_and_so_are_their_gradients(provider: str) -> None:
    mask, wanted = allowed("left"), QUERIES["all"]()
    heads = operands(torch.float64)
    out, logsumexp = OPS.queried_attention(*heads, mask, OPS.query_slots(wanted), False, SCALE, provider)
    assert not out[0, :, : LENGTH // 2].any() and out[0, :, LENGTH // 2 :].all()
    assert logsumexp.shape == out.shape[:3] and not logsumexp.isnan().any()
    gradients = torch.autograd.grad(out.square().sum(), heads)
    assert not gradients[0][0, :, : LENGTH // 2].any(), "of a query"
    assert not any(each[0, :, : LENGTH // 2].any() for each in gradients[1:]), "of keys and values that nobody reads"
    assert all(each.isfinite().all() and each.any() for each in gradients)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_other_queries_are_not_read(provider: str) -> None:
    """What stands in their places may be anything: it is the sum of rows that were left out."""
    heads, wanted = operands(torch.float64), some()
    slots = OPS.query_slots(wanted)
    expected, _ = OPS.queried_attention(*heads, None, slots, True, SCALE, provider)
    spoilt = heads[0].detach().masked_fill(~wanted[:, None, :, None], 1e30).requires_grad_()
    found, _ = OPS.queried_attention(spoilt, *heads[1:], None, slots, True, SCALE, provider)
    assert_close_rms(found, expected)
    (gradient,) = torch.autograd.grad(found.sum(), [spoilt])
    assert not gradient.masked_select(~wanted[:, None, :, None]).any() and gradient.isfinite().all()


@pytest.mark.parametrize("provider", PROVIDERS)
def test_operands_of_any_strides(provider: str) -> None:
    """A sum has a gradient of one number, expanded; channels need not lie side by side."""
    heads = [normal(2, 3, 4, LENGTH, seed=seed).transpose(2, 3).requires_grad_() for seed in range(3)]
    slots = OPS.query_slots(some()[:2])
    out, _ = OPS.queried_attention(*heads, None, slots, True, SCALE, provider)
    expected = plain(heads, some()[:2], None, True)
    assert_close_rms(out, expected)
    for found, want in zip(*(torch.autograd.grad(each.sum(), heads) for each in (out, expected)), strict=True):
        assert_close_rms(found, want)


def test_no_gradient_for_a_result_that_nothing_reads() -> None:
    heads = operands(torch.float64)
    out, _ = OPS.queried_attention(*heads, None, OPS.query_slots(some()), True, SCALE)
    other = heads[0].sum()
    gradients = torch.autograd.grad(other + 0 * out.detach().sum(), heads, allow_unused=True)
    assert gradients[1] is None and gradients[2] is None


def test_operands_of_several_dtypes_are_a_bug() -> None:
    query, key, value = (each.detach().to("meta") for each in operands(torch.float64))
    slots = OPS.query_slots(some()).to("meta")
    with pytest.raises(AssertionError, match="queried_attention: operands of several dtypes"):
        OPS.queried_attention(query.float(), key, value, None, slots, True, SCALE)


@pytest.mark.parametrize("size", [None, 1, 4, LENGTH])
@pytest.mark.parametrize("queries", QUERIES)
def test_slots_hold_the_queries_of_each_sequence(queries: str, size: int | None) -> None:
    wanted = QUERIES[queries]()
    slots = OPS.query_slots(wanted, size)
    most = int(wanted.sum(1).max())
    assert slots.dtype == torch.int64 and slots.shape == (BATCH, most if size is None else size)
    for row, found in zip(wanted, slots.tolist(), strict=True):
        positions = row.nonzero().flatten().tolist()[: len(found)]
        assert found == positions + [-1] * (len(found) - len(positions))


def test_slots_of_an_empty_batch() -> None:
    assert OPS.query_slots(torch.zeros(0, 5, dtype=torch.bool)).shape == (0, 0)
    assert OPS.query_slots(torch.zeros(2, 0, dtype=torch.bool)).shape == (2, 0)


def test_more_slots_than_tokens_are_spare() -> None:
    """A fixed size that no sequence can fill: the fake promises as many slots as were asked for."""
    wanted = some()
    slots = OPS.query_slots(wanted, LENGTH + 6)
    assert slots.shape == (BATCH, LENGTH + 6)
    assert torch.equal(slots[:, :LENGTH], OPS.query_slots(wanted, LENGTH)) and (slots[:, LENGTH:] == -1).all()


def test_a_gpu_has_the_reference_alone_so_far() -> None:
    for table in (QUERIED_ATTENTION, QUERIED_ATTENTION_BACKWARD):
        assert table.choose(OpCall("cpu", torch.float32)).provider == "cpu_sequences"
        choice = table.choose(OpCall("cuda", torch.float32))
        assert (choice.provider, choice.declined) == (REFERENCE, (("cpu_sequences", "runs on cpu, not on cuda"),))
