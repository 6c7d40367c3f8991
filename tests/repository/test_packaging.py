"""The project as users install it: a wheel that holds all of the three folders and works away from the source tree."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PACKAGE_FOLDERS = {
    "sparse_compile": "sparse_compile",
    "passes": "sparse_compile/passes",
    "kernels": "sparse_compile/kernels",
}
TUNED = "kernels/configs/sm_00.json"
"""A table of tuned tiles that is in the wheel whether the tree has others or not."""


def run_python(code: str, cwd: Path, *path: Path) -> str:
    """Run `code` in a new interpreter with `path` ahead of the installed packages, and return what it printed."""
    prefix = f"import sys; sys.path[:0] = {[str(entry) for entry in path]!r}\n"
    done = subprocess.run([sys.executable, "-c", prefix + code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel, without the network, from a copy of the tree (a build leaves files in its source)."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in PACKAGE_FOLDERS:
        shutil.copytree(repo_root / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(repo_root / name, source)
    (source / "kernels" / "configs").mkdir(exist_ok=True)
    (source / TUNED).write_text("{}")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*command, "--wheel-dir", out, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into a folder of its own."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, wheel]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


def test_wheel_holds_every_module_and_data_file(wheel: Path, repo_root: Path) -> None:
    expected = {
        f"{packaged}/{file.relative_to(repo_root / folder).as_posix()}"
        for folder, packaged in PACKAGE_FOLDERS.items()
        for file in (repo_root / folder).rglob("*")
        if file.suffix == ".py" or file.name == "py.typed" or (file.suffix == ".json" and file.parent.name == "configs")
    }
    expected.add(f"sparse_compile/{TUNED}")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == expected


def test_folders_with_modules_are_packages(repo_root: Path) -> None:
    folders = {file.parent for name in PACKAGE_FOLDERS for file in (repo_root / name).rglob("*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_installed_wheel_imports_from_another_directory(installed: Path, tmp_path: Path) -> None:
    code = """
import json, sparse_compile, sparse_compile.kernels, sparse_compile.passes
modules = [sparse_compile, sparse_compile.kernels, sparse_compile.passes]
print(json.dumps([[module.__file__ for module in modules], sorted({"passes", "kernels"} & set(sys.modules))]))
"""
    files, strays = json.loads(run_python(code, tmp_path, installed))
    # An editable install in this environment could stand in for a package that the wheel lacks: look where they are.
    assert [Path(file).relative_to(installed).as_posix() for file in files] == [
        "sparse_compile/__init__.py",
        "sparse_compile/kernels/__init__.py",
        "sparse_compile/passes/__init__.py",
    ]
    assert strays == []


@pytest.mark.slow
def test_entry_point_of_the_wheel_loads_the_backend(installed: Path, tmp_path: Path) -> None:
    code = f"""
from importlib import metadata
(distribution,) = metadata.distributions(name="sparse-compile", path=[{str(installed)!r}])
(entry,) = distribution.entry_points.select(group="torch_dynamo_backends")
print(entry.name, callable(entry.load()))
"""
    assert run_python(code, tmp_path, installed).split() == ["sparselora", "True"]


def test_dynamo_lists_the_backend_without_an_import(tmp_path: Path) -> None:
    code = """
import torch
print("sparselora" in torch._dynamo.list_backends(), "sparse_compile" in sys.modules)
"""
    assert run_python(code, tmp_path).split() == ["True", "False"]


def test_root_folders_are_never_imported_by_their_own_names(repo_root: Path) -> None:
    # With the source tree as the working directory and on the path, `import passes` would work and make second
    # objects of every class.
    code = """
import sparse_compile, sparse_compile.compiler.backend, sparse_compile.kernels, sparse_compile.passes
print(sorted({"passes", "kernels"} & set(sys.modules)))
"""
    assert run_python(code, repo_root, repo_root).strip() == "[]"
    assert {"passes", "kernels"}.isdisjoint(sys.modules)
