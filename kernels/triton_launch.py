"""What every Triton provider needs to launch a kernel: the device, its capability, the precision asked for."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Make the device of a tensor the current one, on which Triton launches; under its interpreter there is none."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def capability_of(x: Tensor) -> tuple[int, int]:
    """Return the compute capability of a tensor's device; under the interpreter that of an H100."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0)


def product_precision() -> str:
    """Return the precision of fp32 products: TF32 only where the user asked for it, as with PyTorch's own."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
