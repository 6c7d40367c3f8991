"""The project as users install it: a wheel that holds all of the three folders and works away from the source tree."""

from __future__ import annotations

import json
import re
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
        if file.suffix == ".py"
        or file.name == "py.typed"
        or (file.suffix == ".json" and file.parent.name == "configs")
        or file.parent.name == "templates"
    }
    expected.add(f"sparse_compile/{TUNED}")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == expected


def test_the_wheel_has_the_command_and_the_version_of_the_project(wheel: Path, repo_root: Path) -> None:
    project = (repo_root / "pyproject.toml").read_text(encoding="utf-8")
    (version,) = re.findall(r'^version = "(.+)"$', project, re.MULTILINE)
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        about = archive.read(metadata).decode()
        entry_points = archive.read(metadata.replace("METADATA", "entry_points.txt")).decode()
    assert f"\nVersion: {version}\n" in about and "\nProvides-Extra: cli\n" in about
    assert "[console_scripts]\nsparselora = sparse_compile.cli.main:main\n" in entry_points
    # The version is written once.
    assert not re.search("^version:", (repo_root / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)


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


STAND_IN = {
    "kernels/__init__.py": "from kernels.sub import get_kernel",
    "kernels/sub.py": "get_kernel = 'the other one'",
    "passes/__init__.py": "get_kernel = 'the other one'",
    "kernels-0.18.3.dist-info/METADATA": "Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.3\n",
}
"""A distribution as Hugging Face's: what its modules say of themselves shows who was imported."""

ONLY_THE_PATH = "import importlib, importlib.util; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]\n"
"""What the environment of the suite has installed under these names is no matter."""


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stand-in")
    for name, text in STAND_IN.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("first", ["root", "stand-in"])
@pytest.mark.parametrize("name", ["kernels", "passes"])
def test_another_package_of_a_root_folders_name_is_the_one_imported(
    name: str, first: str, repo_root: Path, stand_in: Path
) -> None:
    code = f"""
from {name} import get_kernel
import {name}, importlib.metadata
print(get_kernel, "|", {name}.__file__, "|", importlib.util.find_spec({name!r}).origin)
print(importlib.import_module({name!r}) is {name}, importlib.metadata.version("kernels"))
print(importlib.reload({name}).get_kernel, "sparse_compile" in sys.modules)
"""
    path = (repo_root, stand_in) if first == "root" else (stand_in, repo_root)
    origin = stand_in / name / "__init__.py"
    assert run_python(ONLY_THE_PATH + code, repo_root, *path).splitlines() == [
        f"the other one | {origin} | {origin}",
        "True 0.18.3",
        "the other one False",
    ]


def test_a_submodule_of_the_other_package_is_imported_first(repo_root: Path, stand_in: Path) -> None:
    code = "import kernels.sub; print(kernels.sub.get_kernel, kernels.get_kernel)"
    assert run_python(code, repo_root, repo_root, stand_in).strip() == "the other one the other one"


def test_a_second_checkout_stands_aside_too(repo_root: Path, stand_in: Path, tmp_path: Path) -> None:
    for name in ("kernels", "passes"):
        (tmp_path / name).mkdir()
        shutil.copy(repo_root / name / "__init__.py", tmp_path / name)
    shutil.copy(repo_root / "kernels" / "stand_aside.py", tmp_path / "kernels")
    code = "import kernels, passes; print(kernels.get_kernel, passes.get_kernel)"
    assert run_python(code, repo_root, repo_root, tmp_path, stand_in).strip() == "the other one the other one"


def test_a_package_that_another_finder_knows_is_handed_over_to(repo_root: Path, stand_in: Path) -> None:
    # An editable installation is known to a finder of its own, behind the one that searches the path.
    code = f"""
class Editable:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "kernels":
            folder = {str(stand_in / "kernels")!r}
            return importlib.util.spec_from_file_location(
                name, folder + "/__init__.py", submodule_search_locations=[folder]
            )
sys.meta_path.append(Editable)
from kernels import get_kernel
print(get_kernel)
"""
    assert run_python(ONLY_THE_PATH + code, repo_root, repo_root).strip() == "the other one"


@pytest.mark.parametrize("name", ["kernels", "passes"])
@pytest.mark.parametrize("statement", ["import {}", "from {} import get_kernel", "import {}.sub"])
def test_without_another_package_a_bare_name_is_not_there(name: str, statement: str, repo_root: Path) -> None:
    code = f"""
for _ in range(2):
    try:
        {statement.format(name)}
    except ModuleNotFoundError as error:
        print(error.name, "|", error, "|", {name!r} in sys.modules)
"""
    expected = f"{name} | No module named {name!r} | False"
    assert run_python(ONLY_THE_PATH + code, repo_root, repo_root).splitlines() == [expected] * 2


def test_a_check_that_imports_by_a_call_finds_nothing(repo_root: Path) -> None:
    code = """
print(importlib.import_module("kernels"), importlib.util.find_spec("kernels"))
try:
    from kernels import get_kernel
except ModuleNotFoundError as error:
    print(error.name)
"""
    assert run_python(ONLY_THE_PATH + code, repo_root, repo_root).split() == ["None", "None", "kernels"]


@pytest.mark.slow
def test_transformers_sees_the_kernels_that_are_installed(repo_root: Path, stand_in: Path, tmp_path: Path) -> None:
    code = """
from transformers.utils.import_utils import is_kernels_available
print(is_kernels_available(MIN_VERSION="0.18", MAX_VERSION="0.19"))
"""
    assert run_python(code, repo_root, repo_root, stand_in).strip() == "True"
    assert run_python(code, repo_root, repo_root) == run_python(code, tmp_path)
