"""The semantic op of a chain of frozen products, adapters and an elementwise function of them.

    p_i = x_r(i) @ W_i[idx_i].T   or   x_r(i) @ W_i[:, idx_i].T      frozen products of some channels
    t_j = thin_j @ factor_j.T                                         the second products of adapters
    y   = f(p_0, .., t_0, .., v_0, ..)                                v: one value a channel

With f = `p0*p1*sigmoid(p0)` it is the first half of a gated feed-forward block, with `p0 + 2.0*t0` the second half with
its adapter, and the gradient of x is one again: the sum of `(d y * df/dp_i) @ W_i[idx_i]`. f is the text of a formula
(`kernels/codegen/formula.py`): it is differentiated symbolically, and a kernel is generated from it.

A weight may be in 4 bits (NF4 or FP4 of bitsandbytes): what a product uses of it is dequantised on the way.

Saved for backward: the products where derivatives of f read them, thin, factor and vectors; never a slice of a weight,
of one in 4 bits nothing but what it is stored as.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_compile.kernels.codegen.formula import Gradients, parsed
from sparse_compile.kernels.dequantize_4bit.packed import PackedWeight, packed_weights
from sparse_compile.kernels.fused_linear import reference, triton
from sparse_compile.kernels.fused_linear.layout import empty_rows
from sparse_compile.kernels.fused_linear.operands import WHOLE, channels_by_product, out_features
from sparse_compile.kernels.providers import Provider, ProviderTable, triton_runs

FUSED_LINEAR = ProviderTable(
    "fused_linear",
    reference.fused_linear,
    candidates=(Provider("triton", triton.fused_linear, triton_runs),),
)
GRADIENTS = ProviderTable(
    "fused_linear_gradients",
    reference.fused_linear_gradients,
    candidates=(Provider("triton", triton.fused_linear_gradients, triton_runs),),
)


@torch.library.custom_op("sparselora::fused_linear", mutates_args=())
def fused_linear(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    channels: Sequence[Tensor],
    reads: Sequence[int],
    dims: Sequence[int],
    thins: Sequence[Tensor],
    factors: Sequence[Tensor],
    vectors: Sequence[Tensor],
    formula: str,
    dtype: torch.dtype,
    scales: Sequence[Tensor],
    formats: str,
    provider: str,
) -> list[Tensor]:
    """Compute y = f(p_0, .., t_0, .., v_0, ..).

    Args:
        xs: inputs of the frozen products, each (n, depth), of one dtype.
        weights: frozen weights, each (out, in), one for each product, of any float dtype; of a weight in 4 bits the
            packed data.
        channels: (k,) int64, one for each product whose weight is indexed: which rows or columns of it are used.
        reads: for each product, the index of its x.
        dims: for each product, the dimension of the weight that is indexed, or -1: it is used whole.
        thins: (n, r) each.
        factors: (columns, r) each, trained.
        vectors: (columns,) or (1,) each.
        formula: text over `p0..`, `t0..`, `v0..`.
        dtype: of y.
        scales: of each weight in 4 bits, in order, its absmax and, where that is nested, the bytes, what they stand for
            and the offset; see `dequantize_4bit/packed.py`.
        formats: of each weight the text of its `PackedFormat`, nothing of a dense one, joined by semicolons; empty if
            all are dense.
        provider: a name of `FUSED_LINEAR`. It has no default: of an op with lists of tensors PyTorch would drop an
            argument that equals it, and then find the backward's result of another structure.

    Returns:
        y (n, columns); behind it, where a derivative of f reads them, the products (n, columns) in the dtype of `xs`,
        for the backward alone: no gradient flows through them.
    """
    run = FUSED_LINEAR[provider]
    return run(xs, weights, channels, reads, dims, thins, factors, vectors, formula, dtype, scales, formats)  # type: ignore[return-value]


@fused_linear.register_fake
def _(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    channels: Sequence[Tensor],
    reads: Sequence[int],
    dims: Sequence[int],
    thins: Sequence[Tensor],
    factors: Sequence[Tensor],
    vectors: Sequence[Tensor],
    formula: str,
    dtype: torch.dtype,
    scales: Sequence[Tensor],
    formats: str,
    provider: str,
) -> list[Tensor]:
    stored = packed_weights(weights, scales, formats)
    columns = channels[0].shape[0] if dims[0] == 0 else out_features(stored[0])
    rows = xs[0].shape[0]
    saved = [empty_rows(xs[0], rows, columns) for _ in weights] if reference.saves_products(formula) else []
    return [empty_rows(xs[0], rows, columns, dtype), *saved]


@torch.library.custom_op("sparselora::fused_linear_gradients", mutates_args=())
def fused_linear_gradients(
    d_y: Tensor,
    products: Sequence[Tensor],
    thins: Sequence[Tensor],
    factors: Sequence[Tensor],
    vectors: Sequence[Tensor],
    formulas: str,
    dtype: torch.dtype,
    provider: str,
) -> list[Tensor]:
    """Compute d_y times each derivative of a formula.

    Args:
        d_y: (n, columns).
        products: those that `fused_linear` returned.
        thins: (n, r) each.
        factors: (columns, r) each.
        vectors: (columns,) or (1,) each.
        formulas: texts of the derivatives, separated by semicolons.
        dtype: of the results.
        provider: a name of `GRADIENTS`.

    Returns:
        One (n, columns) tensor for each derivative.
    """
    run = GRADIENTS[provider]
    return run(d_y, products, thins, factors, vectors, formulas, dtype)  # type: ignore[return-value]


@fused_linear_gradients.register_fake
def _(
    d_y: Tensor,
    products: Sequence[Tensor],
    thins: Sequence[Tensor],
    factors: Sequence[Tensor],
    vectors: Sequence[Tensor],
    formulas: str,
    dtype: torch.dtype,
    provider: str,
) -> list[Tensor]:
    return [empty_rows(d_y, d_y.shape[0], d_y.shape[1], dtype) for _ in formulas.split(";")]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    xs, weights, channels, reads, dims, thins, factors, vectors, formula, _, scales, formats, provider = inputs
    assert not any(weight.requires_grad for weight in weights), "a frozen product has no gradient for its weight"
    groups = (weights, scales, channels, output[1:], thins, factors, vectors)
    ctx.save_for_backward(*(tensor for group in groups for tensor in group))
    ctx.sizes = [len(group) for group in groups]
    ctx.inputs = len(xs)
    ctx.x_dtype, ctx.x_device = xs[0].dtype, xs[0].device
    ctx.reads, ctx.dims, ctx.formula = tuple(reads), tuple(dims), formula
    ctx.formats, ctx.provider = formats, provider


def _backward(ctx: Any, d_outputs: Sequence[Tensor]) -> tuple[Any, ...]:
    saved = iter(ctx.saved_tensors)
    weights, scales, channels, products, thins, factors, vectors = ([next(saved) for _ in range(n)] for n in ctx.sizes)
    stored = packed_weights(weights, scales, ctx.formats)
    needs_x, _, _, _, _, needs_thin, needs_factor, needs_vector, *_ = ctx.needs_input_grad
    wanted = [f"p{i}" for i, read in enumerate(ctx.reads) if needs_x[read]]
    wanted += [f"t{j}" for j in range(len(thins)) if needs_thin[j] or needs_factor[j]]
    wanted += [f"v{j}" for j in range(len(vectors)) if needs_vector[j]]
    plan = parsed(ctx.formula).gradients(tuple(wanted))
    gradients = _gradients(ctx, d_outputs[0], products, thins, factors, vectors, plan)
    # Each with the number that its derivative is a multiple by.
    found = {name: (gradients[index], scale) for name, (index, scale) in zip(wanted, plan.places, strict=True)}
    d_xs = [_input_gradient(ctx, x, stored, channels, found) if needs_x[x] else None for x in range(ctx.inputs)]
    d_thins: list[Tensor | None] = [None] * len(thins)
    d_factors: list[Tensor | None] = [None] * len(thins)
    d_vectors: list[Tensor | None] = [None] * len(vectors)
    for j, (thin, factor) in enumerate(zip(thins, factors, strict=True)):
        if f"t{j}" in found:
            gradient, scale = found[f"t{j}"]
            gradient = gradient.to(thin.dtype)
            # The scale is applied to what is thin.
            if needs_thin[j]:
                d_thins[j] = (gradient @ factor.to(thin.dtype)) * scale
            if needs_factor[j]:
                d_factors[j] = ((gradient.T @ thin) * scale).to(factor.dtype)
    for j, vector in enumerate(vectors):
        if f"v{j}" in found:
            gradient, scale = found[f"v{j}"]
            summed = gradient.sum(0) if vector.numel() > 1 else gradient.sum()
            d_vectors[j] = (summed * scale).to(vector.dtype).reshape(vector.shape)
    no_weights, no_channels, no_scales = ([None] * len(group) for group in (weights, channels, scales))
    return d_xs, no_weights, no_channels, None, None, d_thins, d_factors, d_vectors, None, None, no_scales, None, None


def _gradients(
    ctx: Any,
    d_y: Tensor,
    products: list[Tensor],
    thins: list[Tensor],
    factors: list[Tensor],
    vectors: list[Tensor],
    plan: Gradients,
) -> list[Tensor]:
    """Return d_y times each distinct derivative."""
    if all(each.expression == 1 for each in plan.formulas) and d_y.dtype == ctx.x_dtype:
        return [d_y]
    formulas = ";".join(each.text for each in plan.formulas)
    return fused_linear_gradients(  # type: ignore[no-any-return]
        d_y, products, thins, factors, vectors, formulas, ctx.x_dtype, ctx.provider
    )


def _input_gradient(
    ctx: Any,
    x: int,
    weights: list[Tensor | PackedWeight],
    channels: list[Tensor],
    by_operand: dict[str, tuple[Tensor, float]],
) -> Tensor:
    """Return the gradient of one x: a sum of products again, with the transposed weights."""
    members = [i for i, read in enumerate(ctx.reads) if read == x]
    gradients = [by_operand[f"p{i}"] for i in members]
    formula = " + ".join(f"{scale!r}*p{i}" if scale != 1 else f"p{i}" for i, (_, scale) in enumerate(gradients))
    own = [weights[i] for i in members]
    chosen = channels_by_product(channels, ctx.dims)
    packed = [weight for weight in own if isinstance(weight, PackedWeight)]
    texts = [weight.format.T.text if isinstance(weight, PackedWeight) else "" for weight in own]
    (d_x,) = fused_linear(
        [gradient for gradient, _ in gradients],
        [weight.data if isinstance(weight, PackedWeight) else weight.T for weight in own],
        [each for i in members if (each := chosen[i]) is not None],
        list(range(len(members))),
        [ctx.dims[i] if ctx.dims[i] == WHOLE else 1 - ctx.dims[i] for i in members],
        [],
        [],
        [],
        formula,
        ctx.x_dtype,
        [scale for weight in packed for scale in (weight.absmax, *weight.nested)],
        ";".join(texts) if packed else "",
        ctx.provider,
    )
    return d_x  # type: ignore[no-any-return]


fused_linear.register_autograd(_backward, setup_context=_save)
