"""Products with a frozen weight on a CPU."""

from __future__ import annotations

from torch import Tensor

from sparse_compile.kernels.cpu_gemm import onednn_declines, product
from sparse_compile.kernels.providers import OpCall, cpu_only


def frozen_linear(x: Tensor, weight: Tensor) -> Tensor:
    """See `reference.frozen_linear`."""
    return product(x, weight)


def declines(call: OpCall) -> str | None:
    """Decline where ATen's own choice of a library is as good, so that the captured product may stay."""
    return cpu_only(call) or onednn_declines(call.dtype, call.columns)
