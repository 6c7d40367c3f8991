"""The name by which TorchDynamo and users find the backend; `compiler/backend.py` holds it."""

from sparse_compile.compiler.backend import sparselora

__all__ = ["sparselora"]
