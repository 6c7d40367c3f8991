"""What the backend finds on this machine: versions, devices, compilers, caches, and itself by its name."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Final

import torch
from packaging.requirements import Requirement

from sparse_compile.compiler.backend import sparselora
from sparse_compile.compiler.compile import BACKEND
from sparse_compile.predictor.store import default_cache_dir
from sparse_compile.torch_private.dynamo import registered_backend
from sparse_compile.torch_private.inductor import cache_folders, cpp_compiler

__all__ = ["Check", "checks"]

_PACKAGE: Final = "sparse-compile"
_PACKAGES: Final = ("torch", "transformers", "peft", "accelerate", "trl", "bitsandbytes", "triton")
_VARIABLES: Final = {
    "Inductor": "TORCHINDUCTOR_CACHE_DIR",
    "Triton": "TRITON_CACHE_DIR",
    "predictor": "SPARSELORA_CACHE_DIR",
}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what.
        found: what is there.
        fault: what is wrong with it and the way out; empty where all is well.
    """

    name: str
    found: str
    fault: str = ""


def checks(device: torch.device) -> Iterator[Check]:
    """Yield what is found, with what is wrong about it.

    Args:
        device: where a model would train.
    """
    yield Check("sparse_compile", version(_PACKAGE))
    yield Check("python", f"{platform.python_version()} on {platform.platform()}")
    yield from _packages()
    cores = os.cpu_count() or 0
    capability = torch.backends.cpu.get_cpu_capability()
    yield Check("cpu", f"{platform.machine()}, {cores} cores, {torch.get_num_threads()} threads, {capability}")
    yield _device(device)
    yield _compiler(device)
    for name, folder in {**cache_folders(), "predictor": str(default_cache_dir())}.items():
        yield _cache(name, Path(folder))
    yield _backend()


def _packages() -> Iterator[Check]:
    """Compare each package that is installed with what this one asks for, whichever extra asks."""
    wanted = {each.name: each.specifier for each in map(Requirement, requires(_PACKAGE) or ()) if each.specifier}
    for name in _PACKAGES:
        try:
            found = version(name)
        except PackageNotFoundError:
            yield Check(name, "not installed")
            continue
        range_ = wanted.get(name)
        fits = range_ is None or range_.contains(found, prereleases=True)
        yield Check(name, found, "" if fits else f"{name}{range_} is admitted: pip install '{name}{range_}'")


def _device(device: torch.device) -> Check:
    if device.type == "cpu":
        return Check("device", "no accelerator: models train on the CPU")
    if device.type != "cuda":
        return Check("device", device.type)
    properties = torch.cuda.get_device_properties(device)
    return Check(
        "device",
        f"{torch.cuda.device_count()} x {properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
        f"compute capability {properties.major}.{properties.minor}",
    )


def _compiler(device: torch.device) -> Check:
    found = cpp_compiler()
    needed = found is None and device.type == "cpu"
    fault = "Inductor compiles for a CPU by it: install g++ or clang, or name one by CXX" if needed else ""
    return Check("C++ compiler", found or "none", fault)


def _cache(name: str, folder: Path) -> Check:
    """Try to write where a cache writes, in the nearest folder that is there already."""
    place = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        fault = f"it cannot be written ({error.strerror}): name another folder by {_VARIABLES[name]}"
        return Check(f"cache of {name}", str(folder), fault)
    return Check(f"cache of {name}", str(folder))


def _backend() -> Check:
    found = registered_backend(BACKEND)
    if found is sparselora:
        return Check("backend", f"torch finds {BACKEND!r} by its entry point")
    fault = "install the package again: pip install --force-reinstall --no-deps sparse-compile"
    return Check("backend", f"torch finds {found} by the name {BACKEND!r}", fault)
