"""The documents: the quick start of the README runs as it stands, and whatever a document names is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import pytest

from documents import anchors, faults, fences, tables
from sparse_compile import SparseLoRAConfig
from sparse_compile.compiler.pipeline import PASSES

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "passes" / "README.md"],
    key=lambda document: document.relative_to(ROOT).parts,
)
README_LINES = 122
CELL_WORDS = 20


def read(repo_root: Path, name: str) -> str:
    return (repo_root / name).read_text(encoding="utf-8")


# --- The README -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_quick_start_runs_and_prints_what_the_readme_says(repo_root: Path, tmp_path: Path) -> None:
    blocks = fences(read(repo_root, "README.md"))
    (code,) = (body for language, body in blocks if language == "python" and "optimizer.step()" in body)
    (printed,) = (body for language, body in blocks if language == "text")
    script = tmp_path / "quick_start.py"
    script.write_text(code, encoding="utf-8")
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, script.name], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert "UserWarning: sparselora" not in run.stderr
    lines = iter(run.stdout.splitlines())
    for expected in printed.splitlines():
        assert any(says_the_same(line, expected) for line in lines), f"{expected!r} is not in:\n{run.stdout}"
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def says_the_same(line: str, expected: str) -> bool:
    """Compare words and whole numbers exactly, decimal fractions to three hundredths: processors round differently."""
    fraction = re.compile(r"\d+\.\d+")
    pairs = zip(fraction.findall(line), fraction.findall(expected), strict=False)
    same_words = fraction.sub("#", line) == fraction.sub("#", expected)
    return same_words and all(float(a) == pytest.approx(float(b), rel=0.03) for a, b in pairs)


def test_the_readme_is_short(repo_root: Path) -> None:
    assert len(read(repo_root, "README.md").splitlines()) <= README_LINES


def test_the_figures_stand_in_the_documents_with_their_conditions(repo_root: Path) -> None:
    ((_, *lines),) = tables(read(repo_root, "README.md"))
    documents = read(repo_root, "docs/measured.md") + read(repo_root, "docs/memory.md")
    figures = {figure for what, result, _ in lines for figure in re.findall(r"\d+\.\d+", f"{what} {result}")}
    assert len(figures) > 10
    assert {figure for figure in figures if not re.search(rf"(?<![\d.]){figure}(?!\d)", documents)} == set()


# --- Every document ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.relative_to(ROOT).as_posix())
def test_what_a_document_names_is_there(document: Path, repo_root: Path) -> None:
    found = faults(document, repo_root)
    assert not found, "\n".join(found)


def test_the_options_are_those_of_the_code(repo_root: Path) -> None:
    (_, *lines), *_ = tables(read(repo_root, "docs/options.md"))
    assert [(cells[0].strip("`"), cells[1].strip("`")) for cells in lines] == [
        (option.name, default_text(option)) for option in fields(SparseLoRAConfig)
    ]


def default_text(option: Field[Any]) -> str:
    default = option.default if option.default is not MISSING else option.default_factory()  # type: ignore[misc]
    if hasattr(default, "__len__") and not default:
        return "none"
    return f'"{default}"' if isinstance(default, str) else str(default)


def test_cells_of_the_options_are_short(repo_root: Path) -> None:
    cells = [cell for table in tables(read(repo_root, "docs/options.md")) for line in table for cell in line]
    assert [cell for cell in cells if len(cell.split()) > CELL_WORDS] == []


def test_the_passes_are_those_of_the_pipeline_in_their_order(repo_root: Path) -> None:
    documented = []
    for names, kind in re.findall(r"^(\*\*`.+?`\*\*) \(([a-z ]+)\)\.", read(repo_root, "docs/passes.md"), re.MULTILINE):
        documented += [(name, kind) for name in re.findall(r"`(\w+)`", names)]
    kinds = {"exact": "exact", "approximate": "approximate", "requested": "by request"}
    expected = [(each.name, "analysis" if each.analysis else kinds[each.numerics.value]) for each in PASSES]
    assert documented == expected


# --- The checks can fail ----------------------------------------------------------------------------------------------

BROKEN = """# A title

## It's `here`, twice
## It's `here`, twice

[fine](there.md#a-heading) [fine](#its-here-twice-1) [fine](https://example.org/nowhere) `[code](nowhere.md)`
[no file](nowhere.md) [no heading](there.md#nothing) ![no picture](figures/none.svg) [no heading](#its-here-twice-2)

`passes/there.py`, `passes/<name>.py`, `kernels/nowhere.py`, `there.py::test_x`, `nowhere.py`
`sparse_compile.options.config`, `sparse_compile.explain(model)`, `sparse_compile.ir.facts`, `sparse_compile.nothing`
`make good`, `make bad`; please make sure

```bash
make worse    # python docs/there.md docs/gone.md
```

```python
# [not a link](in_code.md); make nothing
import sparse_compile.session
```

```python
f(x=1, ...)
```
"""


def test_the_checks_can_fail(tmp_path: Path) -> None:
    for name, text in {
        "Makefile": "BIN := bin\ngood: ## a target\n\techo\n",
        "docs/there.md": "## A heading\n```\n# nothing\n```\n",
        "docs/broken.md": BROKEN,
        "passes/there.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert faults(tmp_path / "docs" / "there.md", tmp_path) == []
    assert faults(tmp_path / "docs" / "broken.md", tmp_path) == [
        f"docs/broken.md: {fault}"
        for fault in (
            "no Python: positional argument follows keyword argument (<unknown>, line 1)",
            "link nowhere.md: no such file",
            "link there.md#nothing: no such heading",
            "link figures/none.svg: no such file",
            "link #its-here-twice-2: no such heading",
            "no path docs/gone.md",
            "no path kernels/nowhere.py",
            "no file kernels/nowhere.py",
            "no file nowhere.py",
            "no module or name sparse_compile.session",
            "no module or name sparse_compile.ir.facts",
            "no module or name sparse_compile.nothing",
            "no target make worse",
            "no target make bad",
        )
    ]


@pytest.mark.parametrize(
    ("heading", "anchor"),
    [
        ("Where sparsity pays", "where-sparsity-pays"),
        ("Dense steps, and the predictor's factors", "dense-steps-and-the-predictors-factors"),
        ("`token_bucket` of [docs](options.md)", "token_bucket-of-docs"),
        ("What is recomputed — never", "what-is-recomputed--never"),
    ],
)
def test_anchors_are_those_of_github(heading: str, anchor: str) -> None:
    assert anchors(f"# T\n\n## {heading}\n") == {"t", anchor}


def test_output_is_compared_in_words_and_numbers() -> None:
    assert says_the_same("step 7: loss 4.88", "step 7: loss 4.87")
    assert not says_the_same("step 6: loss 4.87", "step 7: loss 4.87")
    assert not says_the_same("step 7: loss 5.87", "step 7: loss 4.87")
    assert not says_the_same("step 7: loss 4.87 and more", "step 7: loss 4.87")
