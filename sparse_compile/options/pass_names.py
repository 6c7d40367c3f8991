"""The names of the passes, which the option `disable` takes."""

from __future__ import annotations

import functools

from sparse_compile.torch_private.sources import package_folder

_NO_CHAPTERS = ("read", "write")
"""Folders of the package that hold what passes share."""


@functools.cache
def pass_names() -> frozenset[str]:
    """Return the names of all passes, by place: each module in a chapter of `sparse_compile.passes` is one.

    Options stand below passes, so no pass is imported.
    """
    modules = package_folder("sparse_compile.passes").glob("*/*.py")
    return frozenset(
        file.stem for file in modules if file.parent.name not in _NO_CHAPTERS and file.name != "__init__.py"
    )
