"""The example of CONTRIBUTING.md: its pass and its tests run as they stand there, at the place that it gives them."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import graphs
from decoder import DecoderConfig, Fp64Decoder
from documents import fences, tables
from graphs import IGNORE, capture, run_passes, targets, tokens
from sparse_compile.compiler import pipeline
from sparse_compile.compiler.pipeline import PASSES, in_order
from sparse_compile.compiler.runner import run_pipeline
from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.passes.protocol import Pass
from sparse_compile.passes.sites.find_projections import FindProjections

NAME = "drop_unit_scales"
LINES = 202
COUNTS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def block(repo_root: Path, language: str, has: str) -> str:
    """Return the one block of a language that has some text."""
    blocks = fences((repo_root / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    (body,) = (body for found, body in blocks if found == language and has in body)
    return body


def load(file: Path, source: str | None = None) -> ModuleType:
    """Import a file, into which a source is written first, as a module of its name."""
    if source is not None:
        file.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def example(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Pass:
    source = block(repo_root, "python", "class DropUnitScales")
    return load(tmp_path_factory.mktemp("example") / f"{NAME}.py", source).DropUnitScales()  # type: ignore[no-any-return]


@pytest.fixture
def order(example: Pass, repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Pass, ...]:
    """The pipeline with the pass where the difference puts it."""
    lines = block(repo_root, "diff", "DropUnitScales").splitlines()
    named = [re.sub(r"\W", "", line) for line in lines]
    classes: list[Any] = [type(each).__name__ for each in PASSES]
    before, added, after = named
    assert lines[1].startswith("+") and added == type(example).__name__
    assert classes.index(after) == classes.index(before) + 1
    position = classes.index(after)
    passes = in_order((*PASSES[:position], example, *PASSES[position:]))
    monkeypatch.setattr(graphs, "PASSES", passes)
    return passes


def test_the_pass_has_the_name_of_its_file(example: Pass) -> None:
    assert example.name == NAME and NAME not in {each.name for each in PASSES}


@pytest.mark.usefixtures("order")
def test_the_tests_of_the_example_pass(repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "GOLDEN", tmp_path)
    golden = block(repo_root, "text", "= input")
    (tmp_path / f"{NAME}.txt").write_text(golden, encoding="utf-8")
    module = load(tmp_path / f"test_{NAME}.py", block(repo_root, "python", "def test_a_unit_scale_goes"))
    tests = [test for name, test in vars(module).items() if name.startswith("test_")]
    assert len(tests) == 3
    for test in tests:
        test()


def model(scale: float) -> Fp64Decoder:
    return Fp64Decoder(DecoderConfig(layers=1, scale=scale))


def batch() -> tuple[Any, Any]:
    ids, labels = tokens(length=6, vocab=61)
    assert (labels == IGNORE).any()
    return ids, labels


@pytest.mark.usefixtures("order")
def test_the_pass_changes_a_captured_model() -> None:
    captured = capture(model(1.0), *batch())
    run_passes(captured, "canonicalize_linears")
    before = targets(captured.gm).count("mul")
    outcome = run_passes(captured, NAME)[NAME]
    # The adapters of q, k, v, o, gate, up and down.
    assert outcome.changed and outcome.stats == {"scales": 7}
    assert targets(captured.gm).count("mul") == before - 7


def test_the_pipeline_with_the_pass_finds_the_same_sites(order: tuple[Pass, ...]) -> None:
    sparsity = {"layers.0.mlp": 0.5, "layers.0.self_attn": 0.5}
    config = SparseLoRAConfig(layer_sparsity=sparsity, disable=("select_loss_rows",), strict=True)
    results = {}
    for name, passes in {"without": PASSES, "with": order}.items():
        captured = capture(model(1.0), *batch(), config=config)
        results[name] = run_pipeline(captured.gm, captured.ctx, order=passes), captured.ctx
    (without, before), (with_it, after) = results["without"], results["with"]
    assert [record.changed for record in with_it.records if record.name == NAME] == [True]
    assert with_it.made_sparse == without.made_sparse == {"ffn", "attention"}
    assert [site.name for site in after.facts.sites] == [site.name for site in before.facts.sites]
    assert with_it.flops[-1] == without.flops[-1]


def test_a_later_place_breaks_what_find_projections_would_declare(
    example: Pass, order: tuple[Pass, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = pipeline.pass_names() | {NAME}
    monkeypatch.setattr(pipeline, "pass_names", lambda: known)
    find = type("FindProjections", (FindProjections,), {"name": "find_projections", "after": (NAME,)})()
    passes = [find if each.name == find.name else each for each in order]
    assert in_order(passes)
    others = [each for each in passes if each is not example]
    with pytest.raises(ValueError, match=f"find_projections stands before {NAME}, which it is to follow"):
        in_order([*others, example])


def test_the_rooms_are_those_of_the_test(repo_root: Path) -> None:
    (_, *lines), *_ = tables((repo_root / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    rooms = load(repo_root / "tests" / "repository" / "test_rooms.py").ROOMS
    assert tuple(cells[0].strip("`") for cells in lines) == rooms
    below = ["no other room", f"`{rooms[0]}`", *(f"these {count}" for count in COUNTS)]
    assert [cells[2] for cells in lines] == below


def test_it_is_short(repo_root: Path) -> None:
    assert len((repo_root / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) <= LINES
