"""`sparselora explain` on a model of a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoints import save_adapter
from sparse_compile.compiler.capture import TokenCounts


def test_the_report_of_the_first_batch(run: Callable[..., Any], checkpoint: Path, rows: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    options = tmp_path / "options.json"
    options.write_text(json.dumps({"layer_sparsity": {"layers.1.mlp": 0.5}}))
    result = run("explain", "--model", checkpoint, "--data", rows, "--config", options, "--html", page, "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    sparse = [site["name"] for graph in data["graphs"] for site in graph["sites"] if site["sparsity"]]
    assert sparse == ["base_model.model.model.layers.1.mlp"]
    (graph,) = data["graphs"]
    assert graph["adapters"] == 3 * 7 and TokenCounts(*graph["tokens"]).loss == 2 * 3
    assert data["options"] == {"layer_sparsity": {"layers.1.mlp": 0.5}}
    assert any(note.startswith("the model has no adapter: it gets a LoRA of rank 16") for note in data["notes"])
    assert page.read_text().lstrip().lower().startswith("<!doctype html>")


def test_the_adapter_of_a_folder_without_data(run: Callable[..., Any], checkpoint: Path, tmp_path: Path) -> None:
    adapter = save_adapter(checkpoint, tmp_path / "adapter")
    result = run("explain", "--model", adapter, "--preset", "exact", "--batch-size", "1")
    assert result.exit_code == 0, result.stderr
    assert f"sparselora: adapter {adapter} on {checkpoint}" in result.stderr
    assert "sparselora: no --data: 1 rows of 512 random tokens" in result.stderr
    assert "with 3 adapters" in result.stdout and "preset='exact'" in result.stdout
