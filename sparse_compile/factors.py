"""Compute, cache and load the low-rank factors of frozen weights from which channels are predicted.

The predictor needs ``W^T ~ A B``, of rank 8, for each frozen weight (the SVD sparsity estimator of SparseLoRA, arXiv
2506.16500). :class:`FactorStore` asks three sources in turn: published factors, the disk cache, :func:`factorize`.

Conventions: a weight is (out, in) as ``torch.nn.Linear`` stores it; ``A`` is (in, r), ``B`` is (r, out), so that
``x @ A @ B`` approximates ``x @ W.T``.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .config import match_site
from .file_lock import held_lock
from .torch_private import WRAPPER_NAMES, is_fake, write_count
from .upstream import FACTORS_FILE

ALGORITHM_VERSION = 1
"""Part of every cache key: raise it whenever :func:`factorize` would give other numbers."""

# Halko, Martinsson, Tropp (2011), sections 4.2 and 4.5. The spectra of trained weights fall slowly behind the first few
# values, so a wide sketch and three power iterations are worth their eight passes over the weight.
_OVERSAMPLING = 16
_POWER_ITERATIONS = 3

# Elements of a 16-bit weight that are widened at one time: 16 MiB, which the allocator reuses without page faults.
_BLOCK_ELEMENTS = 2**22
_HASH_CHUNK_BYTES = 2**24


class NonFiniteWeight(ValueError):  # noqa: N818  (it names the finding, as StopIteration does)
    """Report a weight that holds NaN or infinity, or whose products overflow: it has no factors."""


@dataclass(frozen=True, eq=False)
class LowRankFactors:
    """Hold ``A`` and ``B`` with ``W^T ~ A B``.

    Attributes:
        a: (in, r) = ``U_r sqrt(S_r)``.
        b: (r, out) = ``sqrt(S_r) V_r^T``.
    """

    a: Tensor
    b: Tensor

    def __post_init__(self) -> None:
        if self.a.ndim != 2 or self.b.ndim != 2 or self.a.shape[1] != self.b.shape[0]:
            raise ValueError(f"factors must be (in, r) and (r, out), got {_shape(self.a)} and {_shape(self.b)}")

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
    _check_weight(weight)
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


def _check_weight(weight: Tensor) -> None:
    if weight.is_meta or is_fake(weight):
        raise ValueError("the weight has no data (a meta or fake tensor): load it before compiling")
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"factors need a weight of shape (out, in), got {_shape(weight)}")
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


def default_cache_dir() -> Path:
    """Return ``$SPARSELORA_CACHE_DIR``, else ``sparselora/factors`` below ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if own := os.environ.get("SPARSELORA_CACHE_DIR"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sparselora" / "factors"


# Weight -> (where and how it was factorised, its factors). One entry per weight, gone with the weight.
_memo: MutableMapping[Tensor, tuple[tuple[object, ...], LowRankFactors]] = WeakTensorKeyDictionary()


class FactorStore:
    """Give the factors of frozen weights, each computed once.

    Factors are kept on disk by the content of the weight, so that another process, another run and a tied weight find
    them; of processes that want the same at once, one computes them. Files are replaced atomically; one that is
    truncated, damaged or of another shape is computed anew. A folder that cannot be written is one ``RuntimeWarning``.

    Args:
        cache_dir: Folder of the disk cache. ``None``: :func:`default_cache_dir`.
        rank: Rank of the factors computed here.
        seed: Seed of the randomised SVD.
        upstream: Published factors by layer name (:func:`load_upstream_factors`), which win over computed ones.
    """

    def __init__(
        self,
        cache_dir: str | os.PathLike[str] | None,
        rank: int,
        seed: int,
        upstream: Mapping[str, LowRankFactors] | None = None,
    ) -> None:
        self.cache_dir = default_cache_dir() if cache_dir is None else Path(cache_dir)
        self.rank = rank
        self.seed = seed
        self.upstream: Mapping[str, LowRankFactors] = {} if upstream is None else upstream
        self._writable = True

    def get(self, name: str, weight: Tensor) -> LowRankFactors:
        """Return the factors of one weight, on its device, float64 for a float64 weight and float32 otherwise.

        Args:
            name: Module path of the weight or of its layer (``model.layers.0.mlp.up_proj.weight``); looks up published
                factors and names the weight in errors.
            weight: (out, in).

        Raises:
            NonFiniteWeight: The weight holds NaN or infinity.
            ValueError: The weight has no factors for another reason, or published ones do not fit its shape.
        """
        try:
            _check_weight(weight)
            if (published := self._published(name, weight)) is not None:
                return published
            identity = (*_identity(weight), self.rank, self.seed, self.cache_dir)
            if weight not in _memo or _memo[weight][0] != identity:
                _memo[weight] = identity, self._cached_or_computed(weight)
            return _memo[weight][1]
        except NonFiniteWeight as error:
            raise NonFiniteWeight(f"{name}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def _published(self, name: str, weight: Tensor) -> LowRankFactors | None:
        layer = _layer_name(name)
        keys = [key for key in self.upstream if match_site(key, layer)]
        if not keys:
            return None
        key = max(keys, key=len)
        factors = self.upstream[key]
        shapes = ((weight.shape[1], factors.rank), (factors.rank, weight.shape[0]))
        for part, given, wanted in zip(("w1", "w2"), (factors.a, factors.b), shapes, strict=True):
            if given.shape != wanted:
                raise ValueError(f"{key}.{part} has shape {_shape(given)}, the weight needs {wanted}")
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return LowRankFactors(*(factor.to(weight.device, dtype) for factor in (factors.a, factors.b)))

    def _cached_or_computed(self, weight: Tensor) -> LowRankFactors:
        path = self.cache_dir / f"{_content_digest(weight, self.rank, self.seed)}.safetensors"
        if (factors := _read(path, weight, self.rank)) is not None:
            return factors
        # The processes of a distributed job come by at the same time, but not surely all of them: no collective here.
        with held_lock(self.cache_dir, path.stem):
            if (factors := _read(path, weight, self.rank)) is None:
                factors = factorize(weight, self.rank, self.seed)
                self._write(path, factors)
        return factors

    def _write(self, path: Path, factors: LowRankFactors) -> None:
        if not self._writable:
            return
        tensors = {"a": factors.a.cpu().contiguous(), "b": factors.b.cpu().contiguous()}
        tensors["checksum"] = _checksum(tensors["a"], tensors["b"])
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # A reader sees the old file or the whole new one; of two writers the later wins, with equal content.
            descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(safetensors_save(tensors))
                os.replace(temporary, path)
            except BaseException:
                os.unlink(temporary)
                raise
        except OSError as error:
            self._writable = False
            warnings.warn(
                f"sparselora: cannot write predictor factors to {path.parent} ({error.strerror}); they are computed "
                "again in the next process. Set SPARSELORA_CACHE_DIR to a folder that can be written.",
                RuntimeWarning,
                stacklevel=2,
            )


def load_upstream_factors(path: str | os.PathLike[str]) -> dict[str, LowRankFactors]:
    """Read the factors of a SparseLoRA release: for each layer ``<layer>.w1`` (in, r) and ``<layer>.w2`` (r, out).

    Args:
        path: ``model.safetensors``, or the folder that holds it.

    Returns:
        Layer name (``model.layers.17.mlp.gate_proj``) to its factors, in the dtype of the file, on the CPU.

    Raises:
        ValueError: No such file, not of this kind, or a factor that is missing, misshapen or not finite (named).
    """
    file = Path(path)
    file = file / FACTORS_FILE if file.is_dir() else file
    try:
        tensors = safetensors_load(file.read_bytes())
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from error
    except SafetensorError as error:
        raise ValueError(f"{file} is not a safetensors file, or damaged: {error}") from error
    layers = set()
    for key, tensor in tensors.items():
        layer, _, part = key.rpartition(".")
        if part not in ("w1", "w2") or not layer:
            raise ValueError(f"{file}: {key!r} is no predictor factor (<layer>.w1 or <layer>.w2)")
        if not bool(tensor.isfinite().all()):
            raise NonFiniteWeight(f"{file}: {key} holds NaN or infinity")
        other = f"{layer}.{'w2' if part == 'w1' else 'w1'}"
        if other not in tensors:
            raise ValueError(f"{file}: {key} is there, {other} is missing")
        layers.add(layer)
    if not layers:
        raise ValueError(f"{file} holds no predictor factors")
    factors = {}
    for layer in sorted(layers):
        try:
            factors[layer] = LowRankFactors(tensors[f"{layer}.w1"], tensors[f"{layer}.w2"])
        except ValueError as error:
            raise ValueError(f"{file}: {layer}.w1 and {layer}.w2: {error}") from error
    return factors


def _layer_name(name: str) -> str:
    """Drop what PEFT and wrappers put into a module path, and the parameter's own name."""
    parts = [part for part in name.split(".") if part != "base_layer" and part not in WRAPPER_NAMES]
    return ".".join(parts[:-1] if parts[-1] == "weight" else parts)


def _identity(weight: Tensor) -> tuple[object, ...]:
    """Return what changes when the weight does, without reading all of it.

    Writes through ``.data`` (as PEFT merges adapters) leave ``_version`` alone: a few elements are compared too.
    """
    flat = weight.detach()
    sample = flat[:: max(1, flat.shape[0] // 16), :: max(1, flat.shape[1] // 16)]
    values = tuple(sample.double().flatten().tolist())
    return weight.data_ptr(), write_count(weight), weight.dtype, weight.stride(), values


def _content_digest(weight: Tensor, rank: int, seed: int) -> str:
    """Hash the weight and everything else that the factors depend on.

    A tree of chunks, because one core hashes about 1 GB/s and ``hashlib`` lets go of the interpreter: the chunks of an
    8B model are hashed on all cores. No chunk is copied unless it is strided or on another device.
    """
    weight = weight.detach()
    rows = max(1, _HASH_CHUNK_BYTES // (weight.shape[1] * weight.element_size()))

    def leaf(start: int) -> bytes:
        chunk = weight[start : start + rows].cpu().contiguous()
        # Not by `numpy()`, after which a storage can no longer be resized, as FSDP2 does with gathered weights.
        data = (ctypes.c_char * chunk.nbytes).from_address(chunk.data_ptr())
        return hashlib.blake2b(data, digest_size=32).digest()

    header = (ALGORITHM_VERSION, rank, seed, str(weight.dtype), tuple(weight.shape))
    root = hashlib.blake2b(repr(header).encode(), digest_size=20)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for digest in pool.map(leaf, range(0, weight.shape[0], rows)):
            root.update(digest)
    return root.hexdigest()


def _checksum(a: Tensor, b: Tensor) -> Tensor:
    digest = hashlib.blake2b(digest_size=16)
    for tensor in (a, b):
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return torch.tensor(list(digest.digest()), dtype=torch.uint8, device="cpu")


def _read(path: Path, weight: Tensor, rank: int) -> LowRankFactors | None:
    """Return the factors in a cache file, or None where it is absent or anything about it is wrong."""
    try:
        # Read whole, not mapped: the file may be replaced at any moment.
        tensors = safetensors_load(path.read_bytes())
        a, b, checksum = tensors["a"], tensors["b"], tensors["checksum"]
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    out_features, in_features = weight.shape
    rank = min(rank, *weight.shape)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    sound = (
        a.shape == (in_features, rank)
        and b.shape == (rank, out_features)
        and a.dtype == b.dtype == dtype
        and torch.equal(checksum, _checksum(a, b))
        and bool(a.isfinite().all())
        and bool(b.isfinite().all())
    )
    return LowRankFactors(a.to(weight.device), b.to(weight.device)) if sound else None


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
