"""The specification of fused products, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from sparse_compile.kernels.codegen.formula import parsed
from sparse_compile.kernels.dequantize_4bit.packed import PackedWeight, packed_weights
from sparse_compile.kernels.dtypes import at_least_fp32
from sparse_compile.kernels.fused_linear.layout import aligned
from sparse_compile.kernels.fused_linear.operands import channels_by_product, whole_weight


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
) -> list[Tensor]:
    """Return y and, where its gradients need them, the products; see `op.fused_linear`."""
    products = []
    stored = packed_weights(weights, scales, formats)
    for read, weight, chosen, dim in zip(reads, stored, channels_by_product(channels, dims), dims, strict=True):
        x = xs[read]
        products.append(x @ _slice(weight, chosen, dim, x.dtype).T)
    y = parsed(formula).evaluate(_operands(products, thins, factors, vectors)).to(dtype)
    return [aligned(y), *(aligned(product) for product in products if saves_products(formula))]


def fused_linear_gradients(
    d_y: Tensor,
    products: Sequence[Tensor],
    thins: Sequence[Tensor],
    factors: Sequence[Tensor],
    vectors: Sequence[Tensor],
    formulas: str,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Return d_y times each of the derivatives; see `op.fused_linear_gradients`."""
    operands = _operands(products, thins, factors, vectors)
    wide = d_y.to(at_least_fp32(d_y))
    return [aligned((wide * parsed(each).evaluate({"d": wide, **operands})).to(dtype)) for each in formulas.split(";")]


def _slice(weight: Tensor | PackedWeight, channels: Tensor | None, dim: int, dtype: torch.dtype) -> Tensor:
    if channels is None:
        return whole_weight(weight).to(dtype)
    if isinstance(weight, PackedWeight):
        return weight.channels(channels, dim, dtype)
    return weight.index_select(dim, channels).to(dtype)


@lru_cache(maxsize=1024)  # every call of the op asks, and differentiating takes longer than its kernel
def saves_products(formula: str) -> bool:
    """Tell whether the derivatives of a formula read its products or thin products."""
    whole = parsed(formula)
    return any(read[0] in "pt" for name in whole.operands for read in whole.derivative(name).operands)


def _operands(
    products: Sequence[Tensor], thins: Sequence[Tensor], factors: Sequence[Tensor], vectors: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Return the operands of a formula by name, in the precision that it is computed in."""
    computed = [thin @ factor.to(thin.dtype).T for thin, factor in zip(thins, factors, strict=True)]
    dtype = at_least_fp32(*products, *computed)
    return {
        f"{kind}{index}": each.to(dtype)
        for kind, group in (("p", products), ("t", computed), ("v", vectors))
        for index, each in enumerate(group)
    }
