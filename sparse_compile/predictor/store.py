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
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sparse_compile.options.presets import match_site
from sparse_compile.predictor.svd import (
    LowRankFactors,
    NonFiniteWeight,
    check_weight,
    factorize,
    shape_of,
)
from sparse_compile.predictor.weight_state import identity_of, sample_of
from sparse_compile.torch_private.modules import WRAPPER_NAMES

ALGORITHM_VERSION = 1
"""Part of every cache key: raise it whenever :func:`factorize` would give other numbers."""

PATIENCE_S = 600.0
"""Longest wait for another process that computes the same factors, in seconds; after that they are computed twice."""

_HASH_CHUNK_BYTES = 2**24


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
            check_weight(weight)
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
                raise ValueError(f"{key}.{part} has shape {shape_of(given)}, the weight needs {wanted}")
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        a, b = (factor.to(weight.device, dtype) for factor in (factors.a, factors.b))
        return LowRankFactors(a, b, published=True)

    def _cached_or_computed(self, weight: Tensor) -> LowRankFactors:
        path = self.cache_dir / f"{_content_digest(weight, self.rank, self.seed)}.safetensors"
        if (factors := _read(path, weight, self.rank)) is not None:
            return factors
        # The processes of a distributed job come by at the same time, but not surely all of them: no collective here.
        with held_lock(path.with_suffix(".lock")):
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


@contextmanager
def held_lock(file: Path, patience: float = PATIENCE_S) -> Iterator[None]:
    """Hold the lock of a file for the duration of the block, waiting for other processes that hold it.

    The lock saves work and guards nothing: where it cannot be had (a folder that cannot be written, a file system
    without locks, no patience left), the block runs without it. The system frees it when its holder dies.

    Args:
        file: what is locked, made if need be. It stays, empty: who removed it could remove the lock of another process.
        patience: longest wait, in seconds.
    """
    # A lock file that merely exists would outlive a holder that dies on another machine.
    lock = FileLock(file, timeout=patience, fallback_to_soft=False)
    with suppress(OSError):  # among them filelock's Timeout
        lock.acquire()
    try:
        yield
    finally:
        with suppress(OSError):
            lock.release()


def _layer_name(name: str) -> str:
    """Drop what PEFT and wrappers put into a module path, and the parameter's own name."""
    parts = [part for part in name.split(".") if part != "base_layer" and part not in WRAPPER_NAMES]
    return ".".join(parts[:-1] if parts[-1] == "weight" else parts)


def _identity(weight: Tensor) -> tuple[object, ...]:
    """Return what changes when the weight does, without reading all of it."""
    return *identity_of(weight), *sample_of(weight).double().flatten().tolist()


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
