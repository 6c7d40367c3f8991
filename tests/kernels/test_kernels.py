"""Every `sparselora` op: legal as a custom op, equal to its specification, with the right gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import sparse_compile.kernels  # noqa: F401 - registers torch.ops.sparselora
from models import normal, random_mask
from sparse_compile import reference as oracle
from sparse_compile.kernels import causal_attention, channel_selection, dora_norm, gathered_linear, token_rows
from sparse_compile.kernels.channel_selection import degenerate_counts, record_channels
from sparse_compile.kernels.channel_selection.reference import spaced_rows
from sparse_compile.kernels.dora_norm.reference import dora_norm as plain_dora_norm
from sparse_compile.kernels.merged_linear.reference import ASSOCIATIONS
from sparse_compile.kernels.providers import REFERENCE, OpCall, Provider, ProviderTable, cpu_only
from sparse_compile.options.config import MASK_GRADIENTS
from sparse_compile.training.roles import token_roles
from tolerances import TOLERANCES, assert_close_rms

OPS = torch.ops.sparselora
FLOATS = (torch.float32, torch.bfloat16, torch.float64)


def index(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def x(*shape: int, seed: int = 0, grad: bool = True) -> Tensor:
    return normal(*shape, seed=seed).requires_grad_(grad)


def frozen(*shape: int, seed: int = 1) -> Tensor:
    return normal(*shape, seed=seed)


MASK = torch.tensor([[False, True, True], [True, False, False]])
TARGET = torch.tensor([-100, 3, 4, -100])
ROWS, CONTEXT = index(1, 2, 3), index(0, 4, 5)

ADAPTED = (x(5, 7), frozen(9, 7), x(2, 7, seed=3), x(9, 2, seed=4), x(9, seed=5))
"""Input, frozen weight, factors and bias of a layer with an adapter."""

LENGTH = 130
"""Queries of two blocks, and of one more than twice the least."""
HEADS = tuple(x(1, LENGTH, 2, 4, seed=seed).detach().transpose(1, 2).requires_grad_() for seed in range(3))
CAUSAL = normal(1, 1, LENGTH, LENGTH).masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), float("-inf"))
BACKWARD = (
    x(1, 2, LENGTH, 4, grad=False),
    *(each.detach() for each in HEADS),
    *(each.detach() for each in causal_attention.reference.causal_attention(*HEADS, CAUSAL, 0.5)),
    CAUSAL,
    0.5,
)

QUERIES = tuple(x(2, 6, heads, 2, seed=heads).detach().transpose(1, 2).requires_grad_() for heads in (2, 1, 1))
"""Query, key and value of grouped heads."""
STRIDED = tuple(normal(2, 1, 2, 6, seed=seed).mT.requires_grad_() for seed in range(3))
WANTED = torch.tensor([[0, 3, 5], [2, -1, -1]])
UNREAD = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril() & (torch.arange(6) > 2).expand(6, 6)
"""Of the two first queries that are wanted, each reads no key."""


def queried(provider: str) -> dict[str, tuple[Any, ...]]:
    """Arguments of attention of some queries."""
    return {
        "bool mask": (*QUERIES, UNREAD, WANTED, False, 0.5, provider),
        "added mask": (*QUERIES, normal(1, 2, 6, 6), WANTED, True, 0.5, provider),
        "causal": (*QUERIES, None, WANTED, True, 0.5, provider),
        "no queries": (*QUERIES, None, WANTED[:, :0], False, 0.5, provider),
        "strided": (*STRIDED, None, WANTED, True, 1.0, provider),
    }


def queried_backward(provider: str) -> tuple[Any, ...]:
    """Arguments of its backward."""
    heads, rest = [each.detach() for each in QUERIES], (UNREAD, WANTED, False, 0.5, provider)
    return (normal(2, 2, 6, 2, seed=8), *heads, *OPS.queried_attention(*heads, *rest), *rest)


def pruned(*shape: int) -> Tensor:
    """A frozen weight of which 40% are zero."""
    return frozen(*shape) * random_mask(*shape, seed=6)


PRUNED = (ADAPTED[0], pruned(9, 7), *ADAPTED[2:])
PRUNED_FROZEN = tuple(each.detach() for each in PRUNED[1:4])

CHAIN = {
    "xs": [x(5, 7)],
    "weights": [frozen(9, 7), frozen(7, 9, seed=2).t()],
    "channels": [index(0, 3, 8), index(1, 2, 5)],
    "thins": [x(5, 2, seed=3)],
    "factors": [x(3, 2, seed=4)],
    "vectors": [x(3, seed=5), x(1, seed=6)],
}
"""Operands of a fused product: of some output channels."""


def chain(formula: str, *, dims: tuple[int, int] = (0, 0), rows: int | None = None) -> tuple[Any, ...]:
    """Arguments of a fused product; with `dims` (1, 1), of two inputs and of some input channels."""
    groups = dict(CHAIN)
    if dims == (1, 1):
        groups |= {"xs": [x(5, 3), x(5, 3, seed=7)], "factors": [x(9, 2, seed=4)], "vectors": [x(9, seed=5)]}
        groups |= {"weights": [frozen(9, 7), frozen(9, 7, seed=2)], "channels": [index(0, 3, 6), index(1, 2, 5)]}
    if rows is not None:
        groups |= {name: [x(rows, each.shape[1]) for each in groups[name]] for name in ("xs", "thins")}
    reads = list(range(len(groups["xs"]))) * (2 // len(groups["xs"]))
    first, last = list(groups.values())[:3], list(groups.values())[3:]
    return (*first, reads, list(dims), *last, formula, torch.float64, [], "", REFERENCE)


def scored(
    formula: str, *vectors: Tensor, rows: int = 6, dtype: torch.dtype = torch.float64, provider: str = REFERENCE
) -> tuple[Any, ...]:
    """Arguments of a score of nine channels by two products of ranks 2 and 3, over some of the rows."""
    rows_of_x, counts = frozen(rows, 7).to(dtype), MASK.reshape(-1)[:rows]
    factors = [frozen(7, 2, seed=2), frozen(7, 3, seed=3)], [frozen(2, 9, seed=4), frozen(3, 9, seed=5)]
    return rows_of_x, counts, *factors, list(vectors), formula, provider


SWIGLU = "(p0 + 2*t0 + v0)*sigmoid(p0 + 2*t0 + v0)*(p1 + v1)"
CHAINS = {
    "swiglu": chain(SWIGLU),
    "inputs gathered": chain("p0 + p1 + 0.5*t0 + v0", dims=(1, 1)),
    "weighted": chain("0.5*p0 - p1", dims=(1, 1)),
    "a scale": chain("v0*(p0 + t0)*v1"),
    "no rows": chain(SWIGLU, rows=0),
    "a whole weight": (
        *([x(5, 7)], [frozen(9, 7), frozen(12, 7)], [index(*range(9))], [0, 0], [-1, 0]),
        *([x(5, 2, seed=3)], [x(9, 2, seed=4)], [x(9, seed=5)], "p0*p1 + 2*t0 + v0", torch.float64, [], "", REFERENCE),
    ),
    "bare": ([x(5, 7)], [frozen(9, 7)], [index(0, 3)], [0], [0], [], [], [], "p0", torch.float64, [], "", REFERENCE),
}

CALLS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "gathered_linear": (OPS.gathered_linear, (x(5, 7), frozen(9, 7), index(0, 3, 8))),
    "gathered_linear, one channel": (OPS.gathered_linear, (x(5, 7), frozen(9, 7), index(4))),
    "gathered_linear, no rows": (OPS.gathered_linear, (x(0, 7), frozen(9, 7), index(0, 3))),
    "gathered_linear, transposed weight": (OPS.gathered_linear, (x(5, 7), frozen(7, 9).t(), index(0, 3, 8))),
    "gathered_linear, cpu_gemm": (OPS.gathered_linear, (x(5, 7), frozen(9, 7), index(0, 8), "cpu_gemm")),
    "gathered_linear, transposed, cpu_gemm": (
        OPS.gathered_linear,
        (x(5, 7), frozen(7, 9).t(), index(0, 8), "cpu_gemm"),
    ),
    "gathered_linear, strided x": (OPS.gathered_linear, (normal(7, 5).t().requires_grad_(), frozen(9, 7), index(2))),
    "gathered_input_linear": (OPS.gathered_input_linear, (x(5, 3), frozen(9, 7), index(0, 3, 6))),
    "gathered_input_linear, one channel": (OPS.gathered_input_linear, (x(5, 1), frozen(9, 7), index(4))),
    "gathered_input_linear, no rows": (OPS.gathered_input_linear, (x(0, 2), frozen(9, 7), index(0, 3))),
    "gathered_input_linear, transposed": (OPS.gathered_input_linear, (x(5, 2), frozen(7, 9).t(), index(0, 3))),
    "gathered_input_linear, transposed, cpu_gemm": (
        OPS.gathered_input_linear,
        (x(5, 2), frozen(7, 9).t(), index(0, 6), "cpu_gemm"),
    ),
    "gathered_input_linear, cpu_gemm": (OPS.gathered_input_linear, (x(5, 2), frozen(9, 7), index(0, 6), "cpu_gemm")),
    **{f"fused_linear, {name}": (OPS.fused_linear, arguments) for name, arguments in CHAINS.items()},
    "fused_linear_gradients": (
        OPS.fused_linear_gradients,
        (
            frozen(5, 3),
            [frozen(5, 3)],
            [frozen(5, 2)],
            [frozen(3, 2)],
            [frozen(3)],
            "p0*t0;v0",
            torch.float32,
            REFERENCE,
        ),
    ),
    "causal_attention": (OPS.causal_attention, (*HEADS, CAUSAL, 0.5)),
    "causal_attention, cpu_blocks": (OPS.causal_attention, (*HEADS, CAUSAL, 0.5, "cpu_blocks")),
    "causal_attention_backward": (OPS.causal_attention_backward, BACKWARD),
    "causal_attention_backward, cpu_blocks": (OPS.causal_attention_backward, (*BACKWARD, "cpu_blocks")),
    "query_slots": (OPS.query_slots, (MASK, 2)),
    "query_slots, more than tokens": (OPS.query_slots, (MASK, 5)),
    **{
        f"queried_attention, {kind}, {provider}": (OPS.queried_attention, arguments)
        for provider in (REFERENCE, "cpu_sequences")
        for kind, arguments in queried(provider).items()
    },
    **{
        f"queried_attention_backward, {provider}": (OPS.queried_attention_backward, queried_backward(provider))
        for provider in (REFERENCE, "cpu_sequences")
    },
    "frozen_linear": (OPS.frozen_linear, (x(2, 5, 7), frozen(9, 7))),
    "frozen_linear, cpu_onednn": (OPS.frozen_linear, (x(5, 7), frozen(9, 7), "cpu_onednn")),
    "frozen_linear, no rows": (OPS.frozen_linear, (x(0, 7), frozen(9, 7), "cpu_onednn")),
    "frozen_linear, transposed weight": (OPS.frozen_linear, (x(5, 7), frozen(7, 9).t(), "cpu_onednn")),
    "frozen_linear, strided x": (OPS.frozen_linear, (normal(7, 5).t().requires_grad_(), frozen(9, 7))),
    **{f"merged_linear, {order}": (OPS.merged_linear, (*ADAPTED, 1.5, order)) for order in ASSOCIATIONS},
    **{
        f"merged_linear, no bias, three dimensions, {order}": (
            OPS.merged_linear,
            (x(2, 3, 7), *ADAPTED[1:4], None, 0.5, order),
        )
        for order in ("F1B5", "F2B5")
    },
    "merged_linear, no rows": (OPS.merged_linear, (x(0, 7), *ADAPTED[1:], 1.5, "F1B5")),
    "merged_linear, rank one, transposed weight": (
        OPS.merged_linear,
        (x(5, 7), frozen(7, 9).t(), x(1, 7, seed=3), x(9, 1, seed=4), None, 2.0, "F2B5"),
    ),
    "merged_linear, strided x": (OPS.merged_linear, (normal(7, 5).t().requires_grad_(), *ADAPTED[1:], 1.5, "F1B5")),
    "merged_input_gradient": (OPS.merged_input_gradient, (x(5, 9), *ADAPTED[1:4], 1.5)),
    "merged_input_gradient, no rows": (OPS.merged_input_gradient, (x(0, 9), *ADAPTED[1:4], 1.5)),
    **{
        f"masked_linear, {gradient}, {provider}": (OPS.masked_linear, (*PRUNED, 1.5, gradient, provider))
        for gradient in MASK_GRADIENTS
        for provider in (REFERENCE, "blocks")
    },
    "masked_linear, no bias, three dimensions": (
        OPS.masked_linear,
        (x(2, 3, 7), *PRUNED[1:4], None, 0.5, "exact", "blocks"),
    ),
    "masked_linear, no rows": (OPS.masked_linear, (x(0, 7), *PRUNED[1:], 1.5, "exact", "blocks")),
    "masked_linear, rank one, transposed weight": (
        OPS.masked_linear,
        (x(5, 7), pruned(7, 9).t(), x(1, 7, seed=3), x(9, 1, seed=4), None, 2.0, "straight-through", "blocks"),
    ),
    "masked_input_gradient": (OPS.masked_input_gradient, (frozen(5, 9), *PRUNED_FROZEN, 1.5, "blocks")),
    "masked_factor_gradients": (
        OPS.masked_factor_gradients,
        (frozen(5, 9), frozen(5, 7), *PRUNED_FROZEN, 1.5, "exact", "blocks"),
    ),
    "take_rows": (OPS.take_rows, (x(6, 5), ROWS, CONTEXT)),
    "take_rows, columns": (OPS.take_rows, (x(6, 5), ROWS, CONTEXT, index(0, 4))),
    "take_rows, cpu_index": (OPS.take_rows, (x(6, 5), ROWS, CONTEXT, index(0, 4), "cpu_index")),
    "take_rows, no output": (OPS.take_rows, (x(3, 5), index(), index(0, 1, 2), None)),
    "take_rows, no context": (OPS.take_rows, (x(3, 5), index(0, 1, 2), index(), index(1))),
    "put_rows": (OPS.put_rows, (x(3, 5), x(3, 5, seed=2), ROWS, CONTEXT)),
    "put_rows, columns": (OPS.put_rows, (x(3, 5), x(3, 2, seed=2), ROWS, CONTEXT, index(0, 4))),
    "put_rows, cpu_index": (OPS.put_rows, (x(3, 5), x(3, 2, seed=2), ROWS, CONTEXT, index(0, 4), "cpu_index")),
    "put_rows, no output": (OPS.put_rows, (x(0, 5), x(3, 5), index(), index(0, 1, 2))),
    "put_rows, no context": (OPS.put_rows, (x(3, 5), x(0, 1), index(0, 1, 2), index(), index(2))),
    "select_rows": (OPS.select_rows, (x(6, 5), ROWS)),
    "select_rows, heads": (OPS.select_rows, (x(6, 2, 5), ROWS)),
    "select_rows, none": (OPS.select_rows, (x(3, 5), index())),
    "place_rows": (OPS.place_rows, (x(3, 5), ROWS, 6)),
    "place_rows, none": (OPS.place_rows, (x(0, 5), index(), 6)),
    "low_rank_product": (OPS.low_rank_product, (frozen(4, 7), frozen(7, 2), frozen(2, 9))),
    "low_rank_product, bf16": (OPS.low_rank_product, (frozen(4, 7).bfloat16(), frozen(7, 2), frozen(2, 9))),
    "low_rank_product, no rows": (OPS.low_rank_product, (frozen(0, 7), frozen(7, 2), frozen(2, 9))),
    "context_mean": (OPS.context_mean, (frozen(6, 5), MASK)),
    "context_mean, bf16": (OPS.context_mean, (frozen(6, 5).bfloat16(), MASK)),
    "predicted_norms": (OPS.predicted_norms, (frozen(6, 7), MASK.reshape(-1), frozen(7, 2), frozen(2, 9), None)),
    "predicted_norms, bias": (
        OPS.predicted_norms,
        (frozen(6, 7), MASK.reshape(-1), frozen(7, 2), frozen(2, 9), frozen(9)),
    ),
    "predicted_scores": (OPS.predicted_scores, scored("p0*p1*sigmoid(p0)")),
    "predicted_scores, vectors": (
        OPS.predicted_scores,
        scored("v1*select(p0 + v0, p0 + v0, 0)**2", frozen(9), frozen(1).squeeze()),
    ),
    "predicted_scores, bf16": (OPS.predicted_scores, scored("p0*p1", dtype=torch.bfloat16)),
    "predicted_scores, no rows": (OPS.predicted_scores, scored("p0 + v0", frozen(9), rows=0)),
    "dora_norm": (OPS.dora_norm, (frozen(6, 7), frozen(2, 7), frozen(6, 2), 0.5)),
    "dora_norm, bf16 weight": (OPS.dora_norm, (frozen(6, 7).bfloat16(), frozen(2, 7).float(), frozen(6, 2), 0.5)),
    "dora_norm, transposed weight": (OPS.dora_norm, (frozen(7, 6).t(), frozen(2, 7), frozen(6, 2), 1.0)),
    "dora_norm, no rows": (OPS.dora_norm, (frozen(0, 7), frozen(2, 7), frozen(0, 2), 1.0)),
    "top_channels": (OPS.top_channels, (frozen(9), 4, "site")),
    "top_channels, one": (OPS.top_channels, (frozen(9), 1, "site")),
    "spaced_rows": (OPS.spaced_rows, (MASK, 2)),
    "expand_kv_channels": (OPS.expand_kv_channels, (index(0, 3, 5), 3, 2)),
    "row_counts": (OPS.row_counts, (MASK, TARGET, -100)),
    "output_mask": (OPS.output_mask, (torch.tensor([[-100, 3, -100]]), -100, 1)),
}
"""Every op with inputs of odd shapes; those that are differentiated require a gradient."""


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name: str) -> None:
    op, arguments = CALLS[name]
    torch.library.opcheck(op.default, arguments)


def test_opcheck_of_given_roles() -> None:
    with token_roles(output_mask=MASK):
        torch.library.opcheck(OPS.given_output_mask.default, (torch.zeros(2, 3, 4),))


def test_opcheck_of_a_split() -> None:
    """Its sizes are data: the fake is run where they are allowed."""
    torch.library.opcheck(OPS.split_tokens.default, (MASK,))
    torch.library.opcheck(OPS.split_tokens.default, (MASK, torch.tensor([int(MASK.sum()), 0])))


def test_opcheck_of_the_slots_of_queries() -> None:
    torch.library.opcheck(OPS.query_slots.default, (MASK,))


def test_opcheck_of_rows_of_the_loss() -> None:
    torch.library.opcheck(OPS.loss_rows.default, (TARGET, -100))
    torch.library.opcheck(OPS.loss_rows.default, (TARGET, -100, torch.tensor([0, 2])))


def test_shuffled_mask_is_random_and_keeps_counts() -> None:
    eligible = random_mask(4, 32, seed=3)
    mask = random_mask(4, 32, seed=5) & eligible
    shuffled = OPS.shuffled_mask(mask, eligible)
    assert torch.equal(shuffled.sum(1), mask.sum(1)) and not torch.equal(shuffled, mask)
    assert not (shuffled & ~eligible).any()
    with torch._subclasses.FakeTensorMode() as mode:
        fake = OPS.shuffled_mask(mode.from_tensor(mask), mode.from_tensor(eligible))
    assert fake.shape == mask.shape and fake.dtype == torch.bool


def test_every_op_is_checked() -> None:
    checked = {name.split(",")[0] for name in CALLS} | {
        "given_output_mask",
        "split_tokens",
        "token_slots",  # in test_slot_ops, with the others where slots are spare
        "loss_slots",
        "shuffled_mask",
        "loss_rows",
        "dequantize_4bit",  # in test_four_bit, where there is a weight of that format
        "observe_rows",  # in test_observed_rows, with someone who wants them
    }
    schemas = (schema.name.split("::") for schema in torch._C._jit_get_all_schemas())
    assert checked == {name for library, name in schemas if library == "sparselora"}


# --- Gradients --------------------------------------------------------------------------------------------------------


def differentiated(arguments: tuple[Any, ...]) -> tuple[list[Tensor], Callable[..., tuple[Any, ...]]]:
    """Return what requires a gradient, lists of tensors included, and what puts other tensors in its place."""
    groups = [each if isinstance(each, list) else [each] for each in arguments]
    trained = [each for group in groups for each in group if isinstance(each, Tensor) and each.requires_grad]

    def substitute(*values: Tensor) -> tuple[Any, ...]:
        given = iter(values)
        replaced = [
            [next(given) if isinstance(each, Tensor) and each.requires_grad else each for each in group]
            for group in groups
        ]
        return tuple(new if isinstance(old, list) else new[0] for new, old in zip(replaced, arguments, strict=True))

    return trained, substitute


DIFFERENTIATED = (
    "frozen_linear", "gathered_linear", "gathered_input_linear", "merged_linear", "merged_input_gradient",
    "take_rows", "put_rows",
)  # fmt: skip


@pytest.mark.parametrize("name", [name for name in CALLS if name.split(",")[0] in DIFFERENTIATED])
def test_gradcheck(name: str) -> None:
    op, arguments = CALLS[name]
    trained, substitute = differentiated(arguments)
    assert trained

    def function(*values: Tensor) -> Any:
        return op(*substitute(*values))

    assert torch.autograd.gradcheck(function, trained)
    assert torch.autograd.gradgradcheck(function, trained)


@pytest.mark.parametrize("name", CHAINS)
def test_gradcheck_of_a_fused_product(name: str) -> None:
    trained, substitute = differentiated(CHAINS[name])
    assert torch.autograd.gradcheck(lambda *values: OPS.fused_linear(*substitute(*values))[0], trained)


@pytest.mark.parametrize("name", [name for name in CALLS if name.split(",")[0] == "queried_attention"])
def test_gradcheck_of_attention_of_some_queries(name: str) -> None:
    op, arguments = CALLS[name]
    trained, substitute = differentiated(arguments)
    assert len(trained) == 3
    assert torch.autograd.gradcheck(lambda *values: op(*substitute(*values))[0], trained)


ONCE = ("fused_linear", "causal_attention", "masked_linear", "queried_attention")
"""Ops whose backward is an op without a formula of its own, for all or for some of their operands."""
SUMS = ("fused_linear, inputs gathered", "fused_linear, bare")
"""Gradients of sums are made of products alone, which have formulas."""


@pytest.mark.parametrize("name", [name for name in CALLS if name.split(",")[0] in ONCE and "no rows" not in name])
def test_a_second_derivative_is_right_or_an_error(name: str) -> None:
    """Never a number that is wrong, nor a zero where there is none."""
    op, arguments = CALLS[name]
    trained, substitute = differentiated(arguments)

    def result(*values: Tensor) -> Tensor:
        found = op(*substitute(*values))
        return found if isinstance(found, Tensor) else found[0]

    if name in SUMS:
        assert torch.autograd.gradgradcheck(result, trained)
        return
    d_y = torch.ones_like(result(*trained), requires_grad=True)
    first = torch.autograd.grad(result(*trained), trained, d_y, create_graph=True)
    # Of a bias that is added the gradient is a sum of d_y, in which no operand is left.
    for gradient in first[: -1 if name.startswith("masked_linear") and trained[-1].dim() == 1 else None]:
        with pytest.raises(RuntimeError, match="no autograd formula was registered"):
            torch.autograd.grad(gradient.square().sum(), trained, retain_graph=True, allow_unused=True)


def test_what_a_fused_product_saves() -> None:
    """A sum saves no product; neither do the columns that pad its rows hold anything."""
    (y,) = OPS.fused_linear(*chain("p0 + p1 + t0 + v0"))
    assert y.shape == (5, 3) and y.stride() == (16, 1)
    _, *saved = OPS.fused_linear(*chain(SWIGLU))
    assert [each.shape for each in saved] == [(5, 3), (5, 3)]
    assert len(OPS.fused_linear(*chain("v0*p0"))) == 3


def test_a_trained_weight_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="frozen weight has no gradient"):
        OPS.frozen_linear(x(2, 3), x(4, 3))
    with pytest.raises(AssertionError, match="must be frozen"):
        OPS.gathered_linear(x(2, 3), x(4, 3), index(0))
    with pytest.raises(AssertionError, match="must be frozen"):
        OPS.merged_linear(ADAPTED[0], x(9, 7), *ADAPTED[2:], 1.5, "F2B5")
    with pytest.raises(AssertionError, match="a frozen product has no gradient for its weight"):
        OPS.fused_linear([x(2, 3)], [x(4, 3)], [index(0)], [0], [0], [], [], [], "p0", torch.float64, [], "", REFERENCE)


# --- Causal attention -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", [REFERENCE, "cpu_blocks"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("length", [2, 63, 300])
def test_causal_attention_is_attention(length: int, dtype: torch.dtype, provider: str) -> None:
    heads = [normal(2, length, 2, 8, seed=seed).transpose(1, 2).to(dtype).requires_grad_() for seed in range(3)]
    wide = [each.detach().double().requires_grad_() for each in heads]
    allowed = torch.ones(2, 1, length, length, dtype=torch.bool).tril()
    # Left padding: the first queries of a row read no key at all.
    allowed[0, :, :, : length // 3] = False
    mask = torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, float("-inf"))
    out, _ = OPS.causal_attention(*heads, mask, 0.4, provider)
    expected = torch.nn.functional.scaled_dot_product_attention(*wide, allowed, scale=0.4)
    assert_close_rms(out, expected, dtype)
    seed = normal(*out.shape, seed=9)
    found = torch.autograd.grad(out, heads, seed.to(dtype))
    for name, gradient, want in zip("qkv", found, torch.autograd.grad(expected, wide, seed), strict=True):
        # The gradient of v adds up to 300 weights rounded to bf16, unevenly: the first key is read by every query.
        bounds = TOLERANCES[dtype]
        uneven = dataclasses.replace(bounds, max=2 * bounds.max)
        assert_close_rms(gradient, want, tolerance=uneven if name == "v" else bounds, name=name)


def test_causal_attention_of_strided_operands() -> None:
    """PyTorch's fused kernel takes the channels for neighbours; a sum has a gradient of one number, expanded."""
    heads = [normal(1, 2, 4, LENGTH, seed=seed).transpose(2, 3).requires_grad_() for seed in range(3)]
    found, wanted = (OPS.causal_attention(*heads, CAUSAL, 0.5, provider)[0] for provider in ("cpu_blocks", REFERENCE))
    assert_close_rms(found, wanted)
    gradients = (torch.autograd.grad(out.sum(), heads) for out in (found, wanted))
    for name, gradient, want in zip("qkv", *gradients, strict=True):
        assert_close_rms(gradient, want, name=name)


# --- Merged products --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ASSOCIATIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_order_of_products_is_the_layer_with_its_adapter(order: str, dtype: torch.dtype) -> None:
    given = [value.detach().to(dtype).requires_grad_(value.requires_grad) for value in ADAPTED]
    wide = [value.detach().double().requires_grad_(value.requires_grad) for value in given]
    y = OPS.merged_linear(*given, 1.5, order)[0]
    expected = wide[0] @ wide[1].T + 1.5 * (wide[0] @ wide[2].T) @ wide[3].T + wide[4]
    assert y.dtype == dtype
    assert_close_rms(y, expected)
    seed = normal(*y.shape, seed=9)
    trained = [i for i, value in enumerate(given) if value.requires_grad]
    found = torch.autograd.grad(y, [given[i] for i in trained], seed.to(dtype))
    wanted = torch.autograd.grad(expected, [wide[i] for i in trained], seed)
    for name, gradient, want in zip("xabc", found, wanted, strict=True):
        assert_close_rms(gradient, want, dtype, name=name)


@pytest.mark.parametrize("order", ASSOCIATIONS)
def test_no_merged_matrix_is_saved(order: str) -> None:
    """Of the size of the weight there is the weight; beside the operands there is x A' at most."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (saved.append(tensor), tensor)[1], lambda x: x):
        y, thin = OPS.merged_linear(*ADAPTED, 1.5, order)
    operands = {value.data_ptr() for value in ADAPTED[:4]}
    others = [tensor for tensor in saved if tensor.data_ptr() not in operands and tensor.numel()]
    assert all(tensor.data_ptr() == thin.data_ptr() for tensor in others)
    assert thin.shape == ((0, 2) if order.startswith("F2") else (5, 2)) and y.shape == (5, 9)


def test_operands_of_several_dtypes_are_a_bug() -> None:
    mixed = [value.detach().to("meta") for value in ADAPTED]
    with pytest.raises(AssertionError, match="merged_linear: operands of"):
        OPS.merged_linear(mixed[0].float(), *mixed[1:], 1.5, "F2B5")


# --- Providers --------------------------------------------------------------------------------------------------------


PROVIDED = [
    (gathered_linear.GATHERED_LINEAR, (x(33, 65, grad=False), frozen(47, 65), index(*range(0, 47, 3)))),
    (gathered_linear.GATHERED_INPUT_LINEAR, (x(33, 16, grad=False), frozen(47, 65), index(*range(0, 64, 4)))),
    (token_rows.TAKE_ROWS, (x(6, 5, grad=False), ROWS, CONTEXT, None)),
    (token_rows.TAKE_ROWS, (x(6, 5, grad=False), ROWS, CONTEXT, index(0, 4))),
    (token_rows.PUT_ROWS, (x(3, 5, grad=False), x(3, 5, grad=False), ROWS, CONTEXT, None)),
    (token_rows.PUT_ROWS, (x(3, 5, grad=False), x(3, 2, grad=False), ROWS, CONTEXT, index(0, 4))),
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", range(len(PROVIDED)))
def test_providers_compute_the_reference(case: int, dtype: torch.dtype) -> None:
    table, arguments = PROVIDED[case]
    given = [a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
    wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in given]
    for provider in table._providers:
        if provider.declines(OpCall("cpu", dtype)) is not None:
            continue
        actual: Any = provider.run(*given)
        expected: Any = table[REFERENCE](*wide)
        if isinstance(actual, Tensor):
            actual, expected = (actual,), (expected,)
        for got, want in zip(actual, expected, strict=True):
            assert got.dtype == dtype
            if table in (token_rows.TAKE_ROWS, token_rows.PUT_ROWS):
                assert torch.equal(got.double(), want)
            else:
                assert_close_rms(got, want)


@pytest.mark.parametrize("provider", ["reference", "cpu_gemm"])
def test_only_chosen_channels_are_cast(provider: str) -> None:
    """fp32 weights under bf16 activations: what autocast does to a dense layer."""
    given, weight, channels = frozen(5, 7).bfloat16(), frozen(9, 7).float(), index(1, 2)
    y = OPS.gathered_linear(given, weight, channels, provider)
    assert y.dtype == torch.bfloat16
    assert_close_rms(y, given.double() @ weight.bfloat16()[channels].double().T)


def test_unknown_provider_is_named() -> None:
    with pytest.raises(ValueError, match="gathered_linear has no provider 'nope'; it has cpu_gemm, reference, triton"):
        OPS.gathered_linear(frozen(2, 3), frozen(4, 3), index(0), "nope")


def test_choice_records_what_was_passed_over() -> None:
    table = ProviderTable("op", abs, Provider("fast", abs, cpu_only))
    assert table.choose(OpCall("cpu", torch.float32)).provider == "fast"
    choice = table.choose(OpCall("cuda", torch.float32))
    assert (choice.provider, choice.declined) == (REFERENCE, (("fast", "runs on cpu, not on cuda"),))


# --- Channels ---------------------------------------------------------------------------------------------------------


def test_top_channels_breaks_ties_by_index() -> None:
    assert OPS.top_channels(torch.tensor([1.0, 2, 1, 2, 1]), 3, "s").tolist() == [0, 1, 3]
    assert OPS.top_channels(torch.ones(100), 7, "s").tolist() == list(range(7))


@pytest.mark.parametrize("length", [1, 5, 64])
def test_top_channels_against_loops(length: int) -> None:
    scores = normal(length).abs().mul(3).round()  # with ties
    for k in range(1, length + 1):
        ranked = sorted(range(length), key=lambda i: (-scores[i].item(), i))
        assert OPS.top_channels(scores, k, "s").tolist() == sorted(ranked[:k])
        assert torch.equal(OPS.top_channels(scores, k, "s"), oracle.top_channels(scores, k))


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_scores_that_say_nothing_keep_the_lowest_and_are_counted(value: float) -> None:
    site = f"degenerate {value}"
    scores = torch.zeros(6) if value == 0 else torch.tensor([1.0, 2, value, 4, 5, 6])
    assert OPS.top_channels(scores, 2, site).tolist() == [0, 1]
    OPS.top_channels(scores, 2, site)
    OPS.top_channels(torch.arange(6.0), 2, site)
    assert degenerate_counts()[site] == 2


def test_informative_scores_are_not_counted() -> None:
    OPS.top_channels(torch.arange(6.0), 2, "fine")
    assert "fine" not in degenerate_counts()


def test_records_nest() -> None:
    with record_channels() as outer:
        OPS.top_channels(torch.arange(4.0), 1, "a")
        with record_channels() as inner:
            OPS.top_channels(torch.arange(4.0), 2, "a")
        OPS.top_channels(torch.arange(4.0), 3, "b")
    OPS.top_channels(torch.arange(4.0), 1, "a")
    assert {site: [len(kept) for kept in found] for site, found in outer.items()} == {"a": [1, 2], "b": [3]}
    assert [len(kept) for kept in inner["a"]] == [2] and list(inner) == ["a"]


def test_records_end_with_an_error() -> None:
    with pytest.raises(RuntimeError), record_channels() as record:
        raise RuntimeError
    OPS.top_channels(torch.arange(4.0), 1, "a")
    assert not record


# --- Scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_predicted_norms_against_explicit_norms(bias: bool) -> None:
    rows, weights = frozen(12, 7), random_mask(12)
    a, b, added = frozen(7, 3, seed=2), frozen(3, 9, seed=3), frozen(9, seed=4) if bias else None
    explicit = rows @ a @ b + (added if bias else 0)
    actual = channel_selection.predicted_norms(rows, weights, a, b, added)
    assert_close_rms(actual, explicit[weights].norm(dim=0))


def test_predicted_norms_without_rows_are_zero() -> None:
    none = torch.zeros(4, dtype=torch.bool)
    norms = channel_selection.predicted_norms(frozen(4, 7), none, frozen(7, 3), frozen(3, 9), frozen(9))
    assert torch.equal(norms, torch.zeros(9, dtype=torch.float64))


def test_predicted_scores_against_loops() -> None:
    x_, counts, a_factors, b_factors, (vector, scale), formula, _ = CALLS["predicted_scores, vectors"][1]
    scores = channel_selection.predicted_scores(*CALLS["predicted_scores, vectors"][1])
    assert formula == "v1*select(p0 + v0, p0 + v0, 0)**2"
    for channel in range(9):
        summed = 0.0
        for row, counting in zip(x_, counts, strict=True):
            product = float(row @ a_factors[0] @ b_factors[0][:, channel] + vector[channel])
            summed += float(scale * max(product, 0.0) ** 2) ** 2 * bool(counting)
        assert float(scores[channel]) == pytest.approx(summed**0.5, rel=1e-12)


@pytest.mark.parametrize("formula", ["p0*p1*sigmoid(p0)", "select(p0, p0, 0)*p1", "3"])
def test_predicted_scores_of_rows_that_do_not_count(formula: str) -> None:
    x_, counts, *rest = scored(formula)
    x_[~counts] = float("nan")
    assert channel_selection.predicted_scores(x_, counts, *rest).isfinite().all()
    assert not channel_selection.predicted_scores(x_, torch.zeros_like(counts), *rest).any()


def test_predicted_scores_of_a_token_that_is_no_number() -> None:
    """Of a NaN, a function with a kink is a NaN in PyTorch, though no comparison with it is true."""
    x_, counts, *rest = scored("select(p0, p0, 0)")
    x_[counts.nonzero()[0]] = float("nan")
    assert channel_selection.predicted_scores(x_, counts, *rest).isnan().all()


def test_context_mean_against_loops() -> None:
    rows, weights = frozen(4 * 6, 5), random_mask(4, 6)
    weights[2] = False
    means = channel_selection.context_mean(rows, weights)
    for sequence in range(4):
        kept = [rows[sequence * 6 + t] for t in range(6) if weights[sequence, t]]
        assert_close_rms(means[sequence], torch.stack(kept).mean(0) if kept else torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9])
def test_spaced_rows_against_loops(count: int) -> None:
    weights = random_mask(5, 8)
    weights[1], weights[2] = False, True
    weights[3] = False
    weights[3, 7] = True
    rows, valid = spaced_rows(weights, count)
    for sequence in range(5):
        positions = weights[sequence].nonzero().flatten().tolist()
        expected = sorted({positions[j * len(positions) // count] for j in range(count)}) if positions else []
        own = slice(sequence * count, (sequence + 1) * count)
        assert [row - sequence * 8 for row in rows[own][valid[own]].tolist()] == expected
        assert all(sequence * 8 <= row < (sequence + 1) * 8 for row in rows[own].tolist())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scores_are_fp32_under_autocast(dtype: torch.dtype) -> None:
    rows, a, b = frozen(4, 7).to(dtype), frozen(7, 2).float(), frozen(2, 9).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        product = channel_selection.low_rank_product(rows, a, b)
    assert product.dtype == torch.float32 and torch.equal(product, rows.float() @ a @ b)


# --- DoRA -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapters", FLOATS, ids=str)
@pytest.mark.parametrize("weights", FLOATS, ids=str)
def test_dora_norm_against_loops(weights: torch.dtype, adapters: torch.dtype) -> None:
    w, a, b = frozen(11, 5).to(weights), frozen(3, 5, seed=2).to(adapters), frozen(11, 3, seed=3).to(adapters)
    norms = OPS.dora_norm(w, a, b, 1.5)
    assert norms.dtype == (torch.float64 if torch.float64 in (weights, adapters) else torch.float32)
    for j in range(11):
        row = [w[j, i].double() + 1.5 * (b[j].double() * a[:, i].double()).sum() for i in range(5)]
        assert_close_rms(norms[j], torch.stack(row).square().sum().sqrt())


@pytest.mark.parametrize("elements", [1, 5, 11, 23, 54, 55, 1000])
def test_dora_norm_in_blocks_of_rows(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dora_norm.op._BLOCK, "cpu", elements)
    operands = frozen(11, 5), frozen(3, 5, seed=2), frozen(11, 3, seed=3), 1.5
    assert_close_rms(OPS.dora_norm(*operands), plain_dora_norm(*operands))


def test_dora_norm_is_not_rounded_by_autocast() -> None:
    operands = frozen(11, 5).float(), frozen(3, 5, seed=2).float(), frozen(11, 3, seed=3).float(), 1.5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (
            torch.equal(OPS.dora_norm(*operands), (norms := OPS.dora_norm(*operands))) and norms.dtype == torch.float32
        )
    assert torch.equal(norms, OPS.dora_norm(*operands))


# --- Tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [MASK, torch.zeros(2, 3, dtype=torch.bool), torch.ones(4, dtype=torch.bool)])
def test_split_is_a_partition(mask: Tensor) -> None:
    output, context = OPS.split_tokens(mask)
    assert output.tolist() == [i for i, role in enumerate(mask.flatten().tolist()) if role]
    assert context.tolist() == [i for i, role in enumerate(mask.flatten().tolist()) if not role]


@pytest.mark.parametrize("mask", [MASK, torch.zeros(2, 3, dtype=torch.bool), torch.ones(4, dtype=torch.bool)])
@pytest.mark.parametrize("target", [TARGET, torch.full((3,), -100), torch.arange(5)])
def test_counted_rows_are_found_without_asking_again(mask: Tensor, target: Tensor) -> None:
    counts = OPS.row_counts(mask, target, -100)
    assert counts.tolist() == [int(mask.sum()), int((target != -100).sum())] and counts.device.type == "cpu"
    expected = [*OPS.split_tokens(mask), OPS.loss_rows(target, -100)]
    with torch.profiler.profile() as profile:
        found = [*OPS.split_tokens(mask, counts), OPS.loss_rows(target, -100, counts)]
    assert all(map(torch.equal, found, expected))
    assert "aten::nonzero" not in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("provider", ["reference", "cpu_index"])
def test_put_undoes_take(provider: str) -> None:
    given = frozen(6, 5)
    assert torch.equal(OPS.put_rows(*OPS.take_rows(given, ROWS, CONTEXT), ROWS, CONTEXT, None, provider), given)
    merged = OPS.put_rows(*OPS.take_rows(given, ROWS, CONTEXT, index(1, 3)), ROWS, CONTEXT, index(1, 3), provider)
    assert torch.equal(merged[ROWS], given[ROWS])
    assert torch.equal(merged[CONTEXT][:, [1, 3]], given[CONTEXT][:, [1, 3]])
    assert not merged[CONTEXT][:, [0, 2, 4]].any()


@pytest.mark.parametrize(("head_dim", "groups", "kv_heads"), [(4, 3, 2), (2, 1, 3), (1, 2, 2), (6, 4, 1)])
def test_expand_kv_channels_against_loops(head_dim: int, groups: int, kv_heads: int) -> None:
    kept = torch.randperm(kv_heads * head_dim)[: max(1, kv_heads * head_dim // 2)].sort().values
    expected = sorted(
        query_head * head_dim + channel % head_dim
        for channel in kept.tolist()
        for query_head in range(kv_heads * groups)
        if query_head // groups == channel // head_dim
    )
    expanded = OPS.expand_kv_channels(kept, head_dim, groups)
    assert expanded.tolist() == expected
    assert torch.equal(expanded, oracle.expand_kv_channels(kept, head_dim, groups))


@pytest.mark.parametrize("shift", [0, 1])
def test_output_mask_against_loops(shift: int) -> None:
    labels = torch.where(random_mask(4, 9), 5, -100)
    mask = OPS.output_mask(labels, -100, shift)
    for row in range(4):
        for t in range(9):
            own, other = t, t + 1 if shift else t - 1
            expected = any(0 <= i < 9 and labels[row, i] != -100 for i in (own, other))
            assert bool(mask[row, t]) == expected


@pytest.mark.parametrize("name", ["frozen_linear", "gathered_linear", "gathered_input_linear"])
def test_products_are_counted_by_the_flop_counter(name: str) -> None:
    """The partitioner asks it what a recomputation costs."""
    op, arguments = CALLS[name]
    with FlopCounterMode(display=False) as counter:
        y = op(*arguments)
    assert counter.get_total_flops() == 2 * y.numel() * arguments[0].shape[-1]


@pytest.mark.parametrize("kind", queried(REFERENCE))
def test_flops_of_attention_of_some_queries(kind: str) -> None:
    """Two products for each slot and key, and of the backward five."""
    op, (query, key, value, mask, slots, *rest) = CALLS[f"queried_attention, {kind}, {REFERENCE}"]
    product = 2 * slots.numel() * query.shape[1] * key.shape[2] * query.shape[3]
    with FlopCounterMode(display=False) as counter:
        out, _ = op(query, key, value, mask, slots, *rest)
    assert counter.get_total_flops() == 2 * product
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 5 * product


def test_flops_of_a_fused_product() -> None:
    with FlopCounterMode(display=False) as counter:
        OPS.fused_linear(*CHAINS["swiglu"])
    # Two products of depth 7 and a thin one of depth 2, for three channels of five rows.
    assert counter.get_total_flops() == 2 * 5 * 3 * (7 + 7 + 2)
