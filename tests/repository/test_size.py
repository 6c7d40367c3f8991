"""What is read in one go: no function over 60 lines, no file over 400."""

from __future__ import annotations

import ast
from pathlib import Path

FOLDERS = ("sparse_compile", "passes", "kernels", "benchmarks", "examples")
LINES_OF_A_FUNCTION = 60
LINES_OF_A_FILE = 400


def too_long(source: str) -> list[str]:
    """Return the functions of a source that are too long, and `"file"` where it is itself."""
    functions = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))
    found = [each.name for each in functions if (each.end_lineno or 0) - each.lineno + 1 > LINES_OF_A_FUNCTION]
    return [*found, "file"] if source.count("\n") > LINES_OF_A_FILE else found


def test_no_function_and_no_file_is_too_long(repo_root: Path) -> None:
    files = [file for folder in FOLDERS for file in (repo_root / folder).rglob("*.py")]
    assert len(files) > 100
    found = {str(file.relative_to(repo_root)): too_long(file.read_text(encoding="utf-8")) for file in files}
    assert {file: names for file, names in found.items() if names} == {}


def test_the_check_can_fail() -> None:
    function = "def long():\n" + "    pass\n" * LINES_OF_A_FUNCTION
    assert too_long(function) == ["long"]
    assert too_long(function.replace("    pass\n", "", 1)) == []
    assert too_long("pass\n" * (LINES_OF_A_FILE + 1)) == ["file"]
