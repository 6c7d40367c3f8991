"""Leave the names `kernels` and `passes` to the packages that others install under them.

The root folders of those names are installed as `sparse_compile.kernels` and `sparse_compile.passes`. Where the root is
on `sys.path` (`python -m`, a notebook there), they can be imported under their bare names too, and then hide Hugging
Face's `kernels`, which transformers and bitsandbytes ask for. So their `__init__` calls `stand_aside` there. It loads
this file by its path: an import of `sparse_compile` would load PyTorch and register the ops.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import FrameType

_STEPS_OF_AN_IMPORT = ("importlib._bootstrap", "importlib._bootstrap_external")


def stand_aside(name: str, file: str) -> None:
    """Put the next package of this name on the path into `sys.modules`, as if this one were not there.

    Where there is none, `import` and `from ... import` raise, and `importlib.import_module` returns None once and
    raises from then on, as Python does for a name that `sys.modules` maps to None. transformers needs that: its
    `is_kernels_available` finds this folder, and imports it to learn its version, without a handler. It takes None for
    an absent package.

    Nothing here runs before the first import. Until then `importlib.util.find_spec` finds this folder, whatever else
    there is: a library that asks nothing else takes a package for installed that is not.

    Args:
        name: the bare name.
        file: the `__file__` of the `__init__` that stands aside.

    Raises:
        ModuleNotFoundError: an `import` statement asks, and there is no other package of this name.
    """
    spec = _next_spec(name, file)
    if spec is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # the import that is under way returns what it finds there
        if spec.loader is not None:
            spec.loader.exec_module(module)
    elif _asked_by_import_module(file):
        sys.modules[name] = None  # type: ignore[assignment]
    else:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def _next_spec(name: str, file: str) -> ModuleSpec | None:
    """Return what an import would find behind this folder."""
    behind = list(_entries_behind(os.path.dirname(os.path.dirname(os.path.realpath(file)))))
    for finder in sys.meta_path:
        # A finder that reads `sys.path` itself may come back with this folder.
        find = getattr(finder, "find_spec", None)
        spec: ModuleSpec | None = find(name, behind) if find is not None else None
        if spec is not None and os.path.realpath(spec.origin or "") != os.path.realpath(file):
            return spec
    return None


def _entries_behind(root: str) -> Iterator[str]:
    """Yield the entries of `sys.path` behind the first that is `root`: two checkouts never hand over in a circle."""
    seen = False
    for entry in sys.path:
        if os.path.realpath(entry) == root:
            seen = True
        elif seen:
            yield entry


def _asked_by_import_module(file: str) -> bool:
    """Tell whether the import of `file` that is under way was asked for by `importlib.import_module`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (
        frame.f_globals.get("__name__") in _STEPS_OF_AN_IMPORT or frame.f_code.co_filename in (__file__, file)
    ):
        frame = frame.f_back
    return frame is not None and frame.f_code is importlib.import_module.__code__
