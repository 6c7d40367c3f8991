"""Tell one state of this package's sources from another, for the keys of PyTorch's caches."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from pathlib import Path

_PACKAGES = ("sparse_compile", "sparse_compile.passes", "sparse_compile.kernels")


@functools.cache
def source_hash() -> str:
    """Return a hash of the sources of this package, of the passes and kernels beneath it, and of tuned tiles.

    Files are found by their place: nothing is imported.
    """
    digest = hashlib.sha256()
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.submodule_search_locations, f"{package} has no folder"
        root = Path(spec.submodule_search_locations[0])
        for file in sorted((*root.rglob("*.py"), *root.glob("configs/*.json"))):
            digest.update(str(file.relative_to(root)).encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
