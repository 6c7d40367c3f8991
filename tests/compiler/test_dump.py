"""Dumps: one folder per compiled graph, equal from run to run, free of this machine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from graphs import PASS_NAMES, capture, render
from models import batch, fp64_decoder
from sparse_compile.compiler.dump import GraphDump, dump_root

TESTS = Path(__file__).resolve().parents[1]
PROGRAM = """
import sys
import torch
from graphs import graph_eager
from models import batch, fp64_decoder
import sparse_compile.compiler.executable
sparse_compile.compiler.executable.compile_with_inductor = graph_eager
options = {"layer_sparsity": {"1.mlp": 0.5, "1.self_attn": 0.5}}
torch.compile(fp64_decoder(layers=3), backend="sparselora", options=options)(**batch(61))
"""
TIMES = {"milliseconds"}
TIMES_IN_PAGES = re.compile(r"took [\d.]+ s|<td>\d+<td>")


def dumped(folder: Path, cache: Path) -> Path:
    """Compile a model in a process of its own; return the one folder of its dump."""
    environment = {
        **os.environ,
        "SPARSELORA_DUMP": str(folder),
        "SPARSELORA_CACHE_DIR": str(cache),
        "PYTHONPATH": os.pathsep.join([str(TESTS / "helpers"), os.environ.get("PYTHONPATH", "")]),
        "PYTHONHASHSEED": str(len(folder.name)),
    }
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, env=environment, cwd=cache.parent)
    (graph,) = folder.iterdir()
    return graph


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dumps")
    return dumped(root / "one", root / "cache one")


def test_one_file_for_each_pass(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    graphs = [f"{i:02d}_{name}.txt" for i, name in enumerate(("captured", *PASS_NAMES))]
    assert names == sorted([*graphs, "index.html", "manifest.json", "plan.json"])
    assert folder.name == "0_0"


@pytest.mark.slow
def test_equal_from_run_to_run(folder: Path, tmp_path: Path) -> None:
    """The second process has another hash seed and other folders."""
    other = dumped(tmp_path / "another", tmp_path / "cache two")
    for path in sorted(folder.iterdir()):
        if path.name == "manifest.json":
            manifests = [json.loads((each / path.name).read_text()) for each in (folder, other)]
            assert without_times(manifests[0]) == without_times(manifests[1])
        elif path.name == "index.html":
            pages = [TIMES_IN_PAGES.sub("", (each / path.name).read_text()) for each in (folder, other)]
            assert pages[0] == pages[1]
        else:
            assert path.read_bytes() == (other / path.name).read_bytes(), path.name


def test_nothing_of_this_machine(folder: Path) -> None:
    for path in folder.iterdir():
        text = path.read_text()
        for mine in (str(TESTS), str(Path(torch.__file__).parent), str(folder.parent), str(Path.home()), " at 0x"):
            assert mine not in text, f"{path.name} holds {mine}"


def test_manifest_and_plan(folder: Path) -> None:
    manifest, plan = (json.loads((folder / f"{name}.json").read_text()) for name in ("manifest", "plan"))
    assert [each["record"]["name"] for each in manifest["passes"]] == list(PASS_NAMES)
    by_name = {each["record"]["name"]: each for each in manifest["passes"]}
    ffn = by_name["sparsify_ffn"]
    assert ffn["record"]["changed"] and ffn["record"]["stats"]["sites"] == 1
    assert ffn["flops_after"] < ffn["flops_before"]
    assert manifest["compile_id"] == "0/0" and manifest["roles"] == "cross_entropy"
    text = json.dumps(plan)
    assert "layers.1.mlp" in text and "layers.1.self_attn" in text


def test_the_page_has_the_graph_after_each_pass(folder: Path) -> None:
    page = (folder / "index.html").read_text()
    (data,) = re.findall(r'<script type="application/json" id="graphs">(.*?)</script>', page, re.DOTALL)
    (graph,) = json.loads(data)
    assert [step["name"] for step in graph["steps"]] == ["captured", *PASS_NAMES]
    (path,) = folder.glob("*_sparsify_ffn.txt")
    step = graph["steps"][1 + PASS_NAMES.index("sparsify_ffn")]
    lines = [line for first, count in step["runs"] for line in graph["lines"][first : first + count]]
    assert lines == path.read_text().splitlines() and step["changes"]
    assert "<h1>2 of 6 sites sparse, " in page and "layers.1" in page


def test_diffs_show_what_a_pass_did(folder: Path) -> None:
    def lines(name: str) -> set[str]:
        (path,) = folder.glob(f"*_{name}.txt")
        return set(path.read_text().splitlines())

    assert lines("find_ffn") == lines("find_projections")
    added = lines("sparsify_ffn") - lines("insert_predictors")
    assert added and all("# sparsify_ffn layers.1.mlp" in line for line in added)


# --- Folders ----------------------------------------------------------------------------------------------------------


def test_an_existing_folder_is_kept(tmp_path: Path) -> None:
    captured = capture(fp64_decoder(layers=1), **batch(61))
    first = GraphDump(tmp_path, "0/1")
    first.graph("captured", captured.gm.graph, captured.ctx.env.parameters)
    second = GraphDump(tmp_path, "0/1")
    assert (first.folder.name, second.folder.name) == ("0_1", "0_1-1")
    assert (first.folder / "00_captured.txt").read_text() == render(captured)
    assert not list(second.folder.iterdir())


def test_a_folder_is_made(tmp_path: Path) -> None:
    assert GraphDump(tmp_path / "a" / "b", "2/0_1").folder == tmp_path / "a" / "b" / "2_0_1"


def test_option_comes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSELORA_DUMP", "from_environment")
    assert dump_root("from_option") == "from_option" and dump_root(None) == "from_environment"
    monkeypatch.delenv("SPARSELORA_DUMP")
    assert dump_root(None) is None


@pytest.mark.usefixtures("aot_eager_inductor")
def test_dump_dir_option(tmp_path: Path) -> None:
    options = {"layer_sparsity": {"0.mlp": 0.5}, "dump_dir": str(tmp_path / "dump")}
    torch.compile(fp64_decoder(layers=1), backend="sparselora", options=options)(**batch(61))
    assert (tmp_path / "dump" / "0_0" / "plan.json").is_file()


# --- Text -------------------------------------------------------------------------------------------------------------


def test_every_kind_of_line() -> None:
    def function(x: torch.Tensor, scale: float = 0.5) -> tuple[torch.Tensor, ...]:
        parts = x.split([1, 2], dim=-1)
        y = torch.cat([parts[0], parts[1][..., None, 0]], dim=-1).to(torch.float32)
        return torch.sum(y, dim=0, keepdim=True), y[1:, ::2] * scale

    text = render(capture(function, torch.zeros(3, 3, dtype=torch.float64)))
    assert text.splitlines()[0] == "%l_x_ : f64[3, 3] = input"
    assert ".split(%l_x_, (1, 2), dim=-1)" in text and "dim=0, keepdim=True" in text
    assert ".to(%" in text and "torch.float32" in text and "f32[" in text
    assert text.splitlines()[-1].startswith("return (%") and text.endswith("\n")
