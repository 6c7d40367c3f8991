"""Private operators of PyTorch, and what its operator objects tell."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket  # what `torch.ops` holds

LINEAR: Final = torch._C._nn.linear
"""What a graph calls for `torch.nn.functional.linear`."""


def overload(target: object) -> OpOverload | None:
    """Return the target of a call where it is one overload of an op, such as `torch.ops.aten.add.Tensor`."""
    return target if isinstance(target, OpOverload) else None


def op_namespace(target: object) -> str | None:
    """Return the namespace of an op or of one overload of it, such as `"aten"`; None for any other target."""
    if isinstance(target, OpOverload):
        return str(target.namespace)
    return target._qualified_op_name.split("::")[0] if isinstance(target, OpOverloadPacket) else None


def overload_name(target: OpOverload) -> str:
    """Return the bare name of an op: `"add"`."""
    return str(target._schema.name.split("::")[-1])


def overload_parameters(target: OpOverload) -> tuple[str, ...]:
    """Return the names of an op's parameters, in order."""
    return tuple(argument.name for argument in target._schema.arguments)


def overload_writes(target: OpOverload) -> bool:
    """Tell whether an op writes to one of its operands."""
    return bool(target._schema.is_mutable)


def assert_on_device(condition: Tensor, message: str) -> None:
    """Have the device check a 0-dim bool tensor in its own order of work, which a CUDA graph may hold."""
    torch._assert_async(condition, message)


def has_onednn_linear() -> bool:
    """Tell whether this build of PyTorch has the op behind `onednn_linear`."""
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return `x @ weight.T` by oneDNN, which no public function of PyTorch reaches in fp32; Inductor emits this op.

    Args:
        x: (..., in) fp32.
        weight: (out, in) fp32, strided in any way.
    """
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return product


def cpu_flash_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Run PyTorch's fused attention on a CPU; return its result and the softmax's logarithmic denominators.

    `scaled_dot_product_attention` calls it too, and keeps the denominators to itself, which the backward needs.

    Args:
        query: (B, H, Q, D).
        key: (B, H, K, D).
        value: (B, H, K, D).
        mask: (B or 1, H or 1, Q, K), added to the scores, or None.
        scale: what the scores are multiplied by.
    """
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return op(query, key, value, attn_mask=mask, scale=scale)  # type: ignore[no-any-return]


def cpu_flash_attention_backward(
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the operands of `cpu_flash_attention`."""
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return op(  # type: ignore[no-any-return]
        d_out, query, key, value, out, logsumexp, 0.0, False, attn_mask=mask, scale=scale
    )
