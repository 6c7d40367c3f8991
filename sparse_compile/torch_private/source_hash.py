"""Tell one state of this package's sources from another, for the keys of PyTorch's caches."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path

_PACKAGES = ("sparse_compile", "sparse_compile.passes", "sparse_compile.kernels")


@functools.cache
def source_hash() -> str:
    """Return a hash of the sources of this package, of the passes and kernels beneath it, and of tuned tiles.

    Files are found by their place: nothing is imported.
    """
    return hash_of_folders(_folder(package) for package in _PACKAGES)


def hash_of_folders(folders: Iterable[Path]) -> str:
    """Return a hash of the sources and tables in some folders."""
    digest = hashlib.sha256()
    for root in folders:
        for file in sorted((*root.rglob("*.py"), *root.glob("configs/*.json"))):
            digest.update(str(file.relative_to(root)).encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations, f"{package} has no folder"
    return Path(spec.submodule_search_locations[0])
