"""The notebook of the examples runs from top to bottom, and is kept without outputs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NAME = "dense_and_sparse.ipynb"
SECONDS = 900
"""What a cell may take on a machine that does other things too."""


@pytest.fixture
def notebook(repo_root: Path) -> Any:
    found = nbformat.read(repo_root / "examples" / NAME, as_version=4)
    nbformat.validate(found)
    return found


def test_the_notebook_is_kept_without_outputs(notebook: Any) -> None:
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) > 5
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(
    notebook: Any, repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(repo_root / "examples"))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    folder = tmp_path / "examples"
    folder.mkdir()
    ran = NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": str(folder)}}).execute()
    printed = "".join(output.text for cell in ran.cells for output in cell.get("outputs", ()) if "text" in output)
    assert re.search(r"layers\.1\.mlp +\d+ of 1024 channels", printed), printed
    assert re.search(r"sparse +\d+ ms a step, held-out loss \d\.\d{3}", printed), printed
    assert "adapter_model.safetensors" in printed
    pictures = [
        output for cell in ran.cells for output in cell.get("outputs", ()) if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 1
    assert (tmp_path / "out" / "notebook" / "report.html").read_text(encoding="utf-8").lstrip().startswith("<!")
