"""Find the sources of this package by their place, and tell one state of them from another."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path

_PACKAGES = ("sparse_compile", "sparse_compile.passes", "sparse_compile.kernels")


def package_folder(package: str) -> Path:
    """Return the folder of a package, of which nothing but its parents is imported."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations, f"{package} has no folder"
    return Path(spec.submodule_search_locations[0])


def hash_of_folders(folders: Iterable[Path]) -> str:
    """Return a hash of the sources and tables in some folders."""
    digest = hashlib.sha256()
    for root in folders:
        for file in sorted((*root.rglob("*.py"), *root.glob("configs/*.json"))):
            digest.update(str(file.relative_to(root)).encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def source_hash() -> str:
    """Return a hash of the sources of this package, of its passes and kernels, and of tuned tiles.

    It is part of the keys of PyTorch's caches.
    """
    return hash_of_folders(package_folder(package) for package in _PACKAGES)
