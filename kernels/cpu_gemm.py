"""The product of two matrices on a CPU, by the faster of the two libraries that PyTorch's CPU builds carry.

ATen hands fp32 products to MKL, which keeps its fastest code for processors of Intel. oneDNN does not look at the
vendor: on an AMD EPYC with AVX-512 it took 0.55 to 0.95 of MKL's time for products with weights of 512 x 1792 up to
2048 x 8192, the most for few tokens. Narrow results are MKL's still. (`python benchmarks/gemm.py` measures both.)
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparse_compile.torch_private.aten import has_onednn_linear, onednn_linear

ONEDNN_COLUMNS = 128
"""Width of a result from which on oneDNN is the faster: with 36 it takes 1.6 times as long as MKL, with 108 as long."""


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Return `x @ weight.T`, (..., out), of operands that need no gradient.

    Args:
        x: (..., in).
        weight: (out, in), of the dtype of `x`; may be a transposed view.
    """
    if onednn_declines(x.dtype, weight.shape[0]) is None:
        return onednn_linear(x, weight)
    return linear(x, weight)


def onednn_declines(dtype: torch.dtype, columns: int) -> str | None:
    """Say why a product is left to ATen's own choice of a library, or return None where oneDNN is the faster."""
    if dtype != torch.float32:
        return "ATen hands products of other dtypes than fp32 to oneDNN itself, or has none for them"
    if columns < ONEDNN_COLUMNS:
        return f"a result of fewer than {ONEDNN_COLUMNS} columns is faster by MKL"
    return _processor_declines()


@functools.cache
def _processor_declines() -> str | None:
    libraries = (torch.backends.mkl, torch.backends.mkldnn)
    if not (all(library.is_available() for library in libraries) and has_onednn_linear()):
        return "this build of PyTorch does not have both MKL and oneDNN"
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "it was found to be faster on processors with AVX-512 alone"
    vendor = _processor_vendor()
    return None if vendor == "AuthenticAMD" else f"it was found to be faster on processors of AMD, not on {vendor}"


def _processor_vendor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("vendor_id"):
                return line.partition(":")[2].strip()
    return "an unknown processor"
