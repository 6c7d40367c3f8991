"""Rows of the support matrix that tests elsewhere hold."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Held:
    """A row that a test elsewhere in the suite holds.

    Attributes:
        title: what the page calls it.
        test: `file::test`, under `tests/`.
        outcome: what the page says of it.
    """

    title: str
    test: str
    outcome: str = "yes"


def exists(test: str) -> bool:
    """Tell whether `file::test` or `file::Class::test` is a test that is neither skipped nor expected to fail."""
    file, *names = test.split("::")
    body: list[ast.stmt] = ast.parse((TESTS / file).read_text(encoding="utf-8")).body
    for name in names:
        found = [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name]
        if not found or any(
            "skip" in (mark := ast.unparse(each)) or "xfail" in mark for each in found[0].decorator_list
        ):
            return False
        body = found[0].body
    return bool(names)
