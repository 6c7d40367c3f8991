"""How a graph is handed to AOTAutograd and Inductor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import fx

from sparse_compile.torch_private.sources import source_hash


def inductor_options() -> Mapping[str, Any]:
    """Return Inductor's options with their values."""
    from torch._inductor import config

    return config.get_config_copy()


def compile_with_inductor(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Mapping[str, Any], mode: str | None
) -> Callable[..., Any]:
    """Compile a graph by AOTAutograd and Inductor.

    AOTAutograd's cache keys a custom op by its name alone: after a change of its backward formula another process would
    go on with the old gradient. A hash of this package's sources is therefore part of every key.
    """
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = {**(list_mode_options(mode) if mode and mode != "default" else {}), **options}
    tag = f"{torch.compiler.config.cache_key_tag}sparselora-{source_hash()}"
    with torch.compiler.config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
        compiled = compile_fx(gm, list(example_inputs), config_patches=patches or None)
    assert callable(compiled), "ahead-of-time compilation to a file was not asked for"
    return compiled


def cpp_compiler() -> str | None:
    """Return the C++ compiler that Inductor uses, None where it finds none."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return get_cpp_compiler()
    except InvalidCxxCompiler:
        return None


def cache_folders() -> Mapping[str, str]:
    """Return the folders of Inductor's cache and of Triton's, by name."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir, triton_cache_dir

    return {"Inductor": cache_dir(), "Triton": triton_cache_dir(0)}


def forget_compiled() -> None:
    """Have Inductor forget what it holds in memory of its caches, so that it looks at their folders again."""
    from torch._inductor.utils import clear_caches

    clear_caches()


def load_source(source: str) -> ModuleType:
    """Write the source of a module into Inductor's cache, where Triton can read it, and import it from there."""
    from torch._inductor.codecache import PyCodeCache

    module: ModuleType = PyCodeCache.load(source)
    return module
