"""Tell one state of this package's sources from another, for the keys of PyTorch's caches."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path


@functools.cache
def source_hash() -> str:
    """Return a hash of the sources of this package, of the passes and kernels beneath it, and of tuned tiles."""
    import sparse_compile.kernels
    import sparse_compile.passes

    digest = hashlib.sha256()
    for package in (sparse_compile, sparse_compile.passes, sparse_compile.kernels):
        root = Path(package.__path__[0])
        for file in sorted((*root.rglob("*.py"), *root.glob("configs/*.json"))):
            digest.update(str(file.relative_to(root)).encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
