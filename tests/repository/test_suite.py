"""The suite itself: `make test` leaves out what is slow, and of every file something stays in it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
SLOW_ALONE: dict[str, str] = {
    "compiler/test_cache.py": "its one test is of Inductor's cache: it compiles for real, in programs of its own",
}
"""Files of which `make test` runs nothing, each with the reason."""
MOST_SLOW = 0.1
"""Share of the functions that may be slow as a whole, or `make test` would say little."""


def functions_of(source: str) -> dict[str, ast.FunctionDef]:
    """Return the test functions of a file by name, those of its classes too."""
    found: dict[str, ast.FunctionDef] = {}
    for node in ast.parse(source).body:
        body = node.body if isinstance(node, ast.ClassDef) and node.name.startswith("Test") else [node]
        for each in body:
            if isinstance(each, ast.FunctionDef) and each.name.startswith("test_"):
                found[each.name] = each
    return found


def is_slow(test: ast.FunctionDef) -> bool:
    """Tell whether the whole of a test is marked, not some of its parameters alone."""
    return any(ast.unparse(each) == "pytest.mark.slow" for each in test.decorator_list)


def all_cases_slow(test: ast.FunctionDef) -> bool:
    """Tell whether the cases of a test that are written out one by one are all marked."""
    for each in test.decorator_list:
        if isinstance(each, ast.Call) and ast.unparse(each.func) == "pytest.mark.parametrize":
            cases = each.args[1].elts if isinstance(each.args[1], ast.List) else []
            if cases and all(isinstance(case, ast.Call) and ast.unparse(case.func) == "slow" for case in cases):
                return True
    return False


def files() -> dict[str, dict[str, ast.FunctionDef]]:
    """Return the tests of each file of the suite."""
    paths = sorted(TESTS.rglob("test_*.py"))
    return {path.relative_to(TESTS).as_posix(): functions_of(path.read_text(encoding="utf-8")) for path in paths}


def test_every_file_has_a_test_that_is_not_slow() -> None:
    slow = {name for name, tests in files().items() if tests and all(map(is_slow, tests.values()))}
    assert slow == SLOW_ALONE.keys()


def test_most_tests_are_not_slow() -> None:
    tests = [test for each in files().values() for test in each.values()]
    assert sum(map(is_slow, tests)) < MOST_SLOW * len(tests)


def test_a_test_whose_every_case_is_slow_is_marked_as_a_whole() -> None:
    tests = ((file, name, test) for file, found in files().items() for name, test in found.items())
    named = [f"{file}::{name}" for file, name, test in tests if all_cases_slow(test)]
    assert named == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("@pytest.mark.slow\ndef test_a(): ...", True),
        ("@pytest.mark.slow\n@pytest.mark.parametrize('x', [1])\ndef test_a(): ...", True),
        ("@pytest.mark.parametrize('x', [1, slow(2)])\ndef test_a(): ...", False),
        ("class TestB:\n    def test_a(self): ...", False),
    ],
)
def test_marks_are_read(source: str, expected: bool) -> None:
    assert is_slow(functions_of(source)["test_a"]) == expected
