"""Low-rank factors of a frozen weight by a randomised SVD."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_compile.torch_private.fake import is_fake

# Halko, Martinsson, Tropp (2011), sections 4.2 and 4.5. The spectra of trained weights fall slowly behind the first few
# values, so a wide sketch and three power iterations are worth their eight passes over the weight.
_OVERSAMPLING = 16


_POWER_ITERATIONS = 3


# Elements of a 16-bit weight that are widened at one time: 16 MiB, which the allocator reuses without page faults.
_BLOCK_ELEMENTS = 2**22


class NonFiniteWeight(ValueError):  # noqa: N818  (it names the finding, as StopIteration does)
    """Report a weight that holds NaN or infinity, or whose products overflow: it has no factors."""


@dataclass(frozen=True, eq=False)
class LowRankFactors:
    """Hold ``A`` and ``B`` with ``W^T ~ A B``.

    Attributes:
        a: (in, r) = ``U_r sqrt(S_r)``.
        b: (r, out) = ``sqrt(S_r) V_r^T``.
        published: Whether they come from a file, whatever the weight holds.
    """

    a: Tensor
    b: Tensor
    published: bool = False

    def __post_init__(self) -> None:
        if self.a.ndim != 2 or self.b.ndim != 2 or self.a.shape[1] != self.b.shape[0]:
            raise ValueError(f"factors must be (in, r) and (r, out), got {shape_of(self.a)} and {shape_of(self.b)}")

    @property
    def rank(self) -> int:
        """Number of singular values."""
        return self.a.shape[1]


def factorize(weight: Tensor, rank: int, seed: int) -> LowRankFactors:
    """Return the leading ``rank`` singular components of ``weight^T`` by a randomised SVD.

    Exact to rounding where the weight's rank is at most ``rank``. The result depends on the arguments alone: the
    global random state is neither read nor moved, and each component's sign is chosen so that the entry of ``A`` that
    is largest in magnitude is positive. Source: Halko, Martinsson and Tropp, 2011 (algorithms 4.4 and 5.1).

    Args:
        weight: (out, in), floating point, on any device. Weights of 16 bits or fewer are widened block by block.
        rank: Number of components, at least 1; no more than ``min(out, in)`` are returned.
        seed: Seed of the sketch.

    Returns:
        Factors on the weight's device, float64 for a float64 weight and float32 otherwise.

    Raises:
        NonFiniteWeight: The weight holds NaN or infinity, or its products overflow.
        ValueError: Not a matrix, not floating point, empty, or without data (meta and fake tensors).
    """
    check_weight(weight)
    weight = weight.detach()
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    rank = min(rank, *weight.shape)
    width = min(rank + _OVERSAMPLING, *weight.shape)

    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False), _full_precision_matmul():
        # The sketch and all thin algebra live on the CPU: numbers that differ less between devices, and QR and SVD
        # work there for every device. The products with the weight run where the weight is.
        generator = torch.Generator("cpu").manual_seed(seed)
        sketch = torch.randn(weight.shape[0], width, generator=generator, dtype=dtype, device="cpu")
        basis = _orthonormal(_times_transposed(weight, sketch))
        for _ in range(_POWER_ITERATIONS):
            # Orthonormalised in between: two products in a row would square the condition number, and the components
            # below sqrt(eps) of the largest would drown.
            basis = _orthonormal(_times_transposed(weight, _orthonormal(_times(weight, basis))))
        projected = _finite(_times(weight, basis))  # (out, width); W^T ~ basis @ projected^T
        left, singular, right = torch.linalg.svd(projected, full_matrices=False)
        root = singular[:rank].sqrt()
        a = (basis @ right[:rank].mT) * root
        b = root[:, None] * left[:, :rank].mT
        sign = torch.where(a.gather(0, a.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0).to(dtype)
        return LowRankFactors((a * sign).to(weight.device), (b * sign.mT).contiguous().to(weight.device))


def check_weight(weight: Tensor) -> None:
    """Raise `ValueError` where no factors can be made of a weight."""
    if weight.is_meta or is_fake(weight):
        raise ValueError("the weight has no data (a meta or fake tensor): load it before compiling")
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"factors need a weight of shape (out, in), got {shape_of(weight)}")
    if not weight.is_floating_point():
        raise ValueError(f"factors need a floating-point weight, got {weight.dtype}: dequantise it first")


@contextmanager
def _full_precision_matmul() -> Iterator[None]:
    """Switch off TF32 and bf16 in fp32 products, which would cost the factors four digits."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def _row_blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield the weight by rows in ``dtype``: whole where it has that dtype already, else in blocks that fit a cache."""
    rows = weight.shape[0] if weight.dtype == dtype else max(1, _BLOCK_ELEMENTS // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        block = slice(start, start + rows)
        yield block, weight[block].to(dtype)


def _times(weight: Tensor, thin: Tensor) -> Tensor:
    """Return ``W @ thin``: (out, in) by (in, k), both ends on the CPU."""
    thin = thin.to(weight.device)
    return torch.cat([block @ thin for _, block in _row_blocks(weight, thin.dtype)]).cpu()


def _times_transposed(weight: Tensor, thin: Tensor) -> Tensor:
    """Return ``W^T @ thin``: (in, out) by (out, k), both ends on the CPU."""
    thin = thin.to(weight.device)
    total = torch.zeros(weight.shape[1], thin.shape[1], dtype=thin.dtype, device=weight.device)
    for rows, block in _row_blocks(weight, thin.dtype):
        total.addmm_(block.mT, thin[rows])
    return total.cpu()


def _finite(thin: Tensor) -> Tensor:
    # The sketch has no zero, so that one NaN or infinity of the weight always reaches the first product: no pass over
    # the weight is needed to find it.
    if not bool(thin.isfinite().all()):
        raise NonFiniteWeight("the weight holds NaN or infinity, or is so large that its products overflow")
    return thin


def _orthonormal(thin: Tensor) -> Tensor:
    return torch.linalg.qr(_finite(thin)).Q  # type: ignore[no-any-return]


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """Return a shape as errors print it."""
    return tuple(tensor.shape)
