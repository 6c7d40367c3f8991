"""Rooms with one direction: a module imports from its own room and from those below it, lazily or not."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOMS = (
    "torch_private",
    "options",
    "graph",
    "kernels",
    "predictor",
    "bank",
    "surrogates",
    "training",
    "passes",
    "compiler",
    "calibration",
    "ecosystem",
    "cli",
)
"""From the lowest to the highest. `sparse_compile/__init__.py` and `backend.py` stand above all of them."""

PASS_FLOORS = (
    ("quantized_weight",),
    ("context",),
    ("protocol",),
    ("read",),
    ("write",),
    ("canonical", "sites", "roles", "exact", "requested", "sparse", "lower"),
)
"""Within `passes`: a chapter imports no other chapter."""

APART = "reference"
"""The oracle imports nothing of the package, and nothing of the package imports it."""


def modules(repo_root: Path) -> dict[str, Path]:
    """Return every module of the package by its dotted name."""
    found = {}
    for folder, package in (("sparse_compile", "sparse_compile"), ("passes", "sparse_compile.passes"),
                            ("kernels", "sparse_compile.kernels")):  # fmt: skip
        for file in (repo_root / folder).rglob("*.py"):
            parts = file.relative_to(repo_root / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = file
    return found


def imported(source: str, known: dict[str, Path]) -> Iterator[str]:
    """Yield the modules of the package that a source imports, wherever the import stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            if (node.module or "").startswith("sparse_compile"):
                for alias in node.names:
                    name = f"{node.module}.{alias.name}"
                    yield name if name in known else str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("sparse_compile"))


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def upward(importer: str, target: str) -> str | None:
    """Say why a module may not import another, or None where it may."""
    own, other = room(importer), room(target)
    if APART in (own, other):
        return None if own == other else "the oracle stands apart"
    if own not in ROOMS or other == own == "":
        return None  # the package's front door
    if other not in ROOMS:
        return "only users come in by the front door"
    if ROOMS.index(other) > ROOMS.index(own):
        return f"{other} stands above {own}"
    if own == other == "passes":
        floors = {name: level for level, names in enumerate(PASS_FLOORS) for name in names}
        (a, *_), (b, *_) = importer.split(".")[2:] or [""], target.split(".")[2:] or [""]
        if a and b and a != b and (floors[b] > floors[a] or (floors[a] == floors[b])):
            return f"passes/{b} stands above or beside passes/{a}"
    return None


def test_imports_only_go_down(repo_root: Path) -> None:
    known = modules(repo_root)
    assert {room(name) for name in known} >= {*ROOMS, APART}
    faults = [
        f"{importer} imports {target}: {reason}"
        for importer, file in known.items()
        for target in imported(file.read_text(encoding="utf-8"), known)
        if (reason := upward(importer, target))
    ]
    assert not faults, "\n".join(faults)


def test_no_module_imports_itself_through_others(repo_root: Path) -> None:
    """Also within a room there is no cycle."""
    known = modules(repo_root)
    graph = {name: set(imported(file.read_text(encoding="utf-8"), known)) - {name} for name, file in known.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for target in sorted(graph.get(name, ())):
                visit(target, (*path, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


@pytest.mark.parametrize(
    ("importer", "target", "allowed"),
    [
        ("sparse_compile.graph.read", "sparse_compile.torch_private.fx", True),
        ("sparse_compile.graph.read", "sparse_compile.passes.context", False),
        ("sparse_compile.passes.sites.find_ffn", "sparse_compile.passes.read.elementwise", True),
        ("sparse_compile.passes.sites.find_ffn", "sparse_compile.passes.roles.trace_roles", False),
        ("sparse_compile.passes.read.elementwise", "sparse_compile.passes.write.sparse_rows", False),
        ("sparse_compile.reference.criteria", "sparse_compile.graph.read", False),
        ("sparse_compile.options.config", "sparse_compile", False),
        ("sparse_compile.bank.base", "sparse_compile.predictor.weight_state", True),
        ("sparse_compile.bank.adapter_bank", "sparse_compile.compiler.backend", False),
        ("sparse_compile.cli.paired", "sparse_compile.torch_private.dynamo", True),
        ("sparse_compile.calibration.calibrate", "sparse_compile.cli.paired", False),
    ],
)
def test_the_check_can_fail(importer: str, target: str, allowed: bool) -> None:
    assert (upward(importer, target) is None) == allowed
