"""Semantic ops for a frozen linear layer of which only some channels are computed.

    gathered_linear(x, W, idx)       = x @ W[idx].T       d x = d y @ W[idx]         (an output-gathered product)
    gathered_input_linear(h, W, idx) = h @ W[:, idx].T    d h = d y @ W[:, idx]      (an input-gathered product)

W is frozen: it has no gradient, and nothing is saved for backward but W itself and the indices. W may be of another
dtype than the activations (fp32 weights under bf16 autocast): only the channels that are used are cast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_compile.kernels.gathered_linear import cpu, reference, triton
from sparse_compile.kernels.providers import REFERENCE, Provider, ProviderTable, cpu_only, triton_runs

GATHERED_LINEAR = ProviderTable(
    "gathered_linear",
    reference.gathered_linear,
    Provider("cpu_gemm", cpu.gathered_linear, cpu_only),
    candidates=(Provider("triton", triton.gathered_linear, triton_runs),),
)
GATHERED_INPUT_LINEAR = ProviderTable(
    "gathered_input_linear",
    reference.gathered_input_linear,
    Provider("cpu_gemm", cpu.gathered_input_linear, cpu_only),
    candidates=(Provider("triton", triton.gathered_input_linear, triton_runs),),
)


@torch.library.custom_op("sparselora::gathered_linear", mutates_args=())
def gathered_linear(x: Tensor, weight: Tensor, channels: Tensor, provider: str = REFERENCE) -> Tensor:
    """Compute only the output channels `channels` of a frozen linear layer.

    Args:
        x: (n, in).
        weight: (out, in), frozen.
        channels: (k,) int64 in [0, out), distinct.
        provider: a name of `GATHERED_LINEAR`.

    Returns:
        (n, k), of the dtype of `x`.
    """
    return GATHERED_LINEAR[provider](x, weight, channels)  # type: ignore[return-value]


@gathered_linear.register_fake
def _(x: Tensor, weight: Tensor, channels: Tensor, provider: str = REFERENCE) -> Tensor:
    return x.new_empty(x.shape[0], channels.shape[0])


@torch.library.custom_op("sparselora::gathered_input_linear", mutates_args=())
def gathered_input_linear(h: Tensor, weight: Tensor, channels: Tensor, provider: str = REFERENCE) -> Tensor:
    """Apply a frozen linear layer to an input of which only the channels `channels` exist; the others count as zero.

    Args:
        h: (n, k).
        weight: (out, in), frozen.
        channels: (k,) int64 in [0, in), distinct.
        provider: a name of `GATHERED_INPUT_LINEAR`.

    Returns:
        (n, out), of the dtype of `h`.
    """
    return GATHERED_INPUT_LINEAR[provider](h, weight, channels)  # type: ignore[return-value]


@gathered_input_linear.register_fake
def _(h: Tensor, weight: Tensor, channels: Tensor, provider: str = REFERENCE) -> Tensor:
    return h.new_empty(h.shape[0], weight.shape[0])


def _save_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, channels, provider = inputs
    assert not weight.requires_grad, "a gathered product has no gradient for its weight: it must be frozen"
    ctx.save_for_backward(weight, channels)
    ctx.provider = provider


# Each product is the other's gradient, of the transposed weight: d x = d y @ W[idx] = d y @ (W.T)[:, idx].T.
def _gathered_linear_backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
    weight, channels = ctx.saved_tensors
    return gathered_input_linear(d_y, weight.T, channels, ctx.provider), None, None, None


def _gathered_input_linear_backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
    weight, channels = ctx.saved_tensors
    return gathered_linear(d_y, weight.T, channels, ctx.provider), None, None, None


gathered_linear.register_autograd(_gathered_linear_backward, setup_context=_save_weight)
gathered_input_linear.register_autograd(_gathered_input_linear_backward, setup_context=_save_weight)
