"""What documents say of the passes is what the code declares: tables of `passes/README.md`, the picture of the way."""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path

from documents import fences, tables
from sparse_compile.compiler.legal import RULES, STAGES
from sparse_compile.compiler.pipeline import PASSES
from sparse_compile.passes.protocol import Numerics, Pass


def table(repo_root: Path, *head: str) -> list[list[str]]:
    """Return the lines of the one table of `passes/README.md` whose head begins like this."""
    found = tables((repo_root / "passes" / "README.md").read_text(encoding="utf-8"))
    (lines,) = (lines for first, *lines in found if first[: len(head)] == list(head))
    return lines


def chapter(each: Pass) -> str:
    return type(each).__module__.split(".")[-2]


def test_the_passes(repo_root: Path) -> None:
    lines = table(repo_root, "pass", "chapter", "kind", "numerics", "requires", "ensures")
    assert [line[:6] for line in lines] == [
        [
            f"`{each.name}`",
            chapter(each),
            "analysis" if each.analysis else "transform",
            each.numerics.value,
            ", ".join(each.requires),
            ", ".join(each.ensures),
        ]
        for each in PASSES
    ]


def test_the_legal_graph(repo_root: Path) -> None:
    lines = table(repo_root, "stage", "what holds")
    assert [tuple(line) for line in lines] == [(f"`{rule.stage}`", rule.holds) for rule in RULES]
    assert {rule.stage for rule in RULES} == set(STAGES)


def test_the_declarations(repo_root: Path) -> None:
    """Each attribute of `Pass` but its name, with its default."""
    written = {name.strip("`"): default.strip("`") for name, default, _ in table(repo_root, "attribute", "default")}
    declared = {name: getattr(Pass, name) for name in Pass.__annotations__ if name != "name"}
    texts = {False: "False", "": '""', (): "()", ("captured",): '("captured",)', Numerics.EXACT: "Numerics.EXACT"}
    assert written == {name: texts[default] for name, default in declared.items()}


def test_the_picture_of_the_way_has_every_pass_in_its_place(repo_root: Path) -> None:
    """One line for each chapter, as often as the pipeline comes to it."""
    picture = fences((repo_root / "docs" / "architecture.md").read_text(encoding="utf-8"))[0][1]
    chapters = {chapter(each) for each in PASSES}
    names = {each.name for each in PASSES}
    drawn = []
    for line in picture.splitlines():
        first, *words = re.findall(r"\w+", line) or [""]
        if first in chapters:
            drawn.append((first, [word for word in words if word in names]))
    assert drawn == [(key, [each.name for each in group]) for key, group in groupby(PASSES, chapter)]
