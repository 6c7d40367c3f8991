"""What the benchmark of surrogates trains, judges, keeps and prints."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from models import tiny_llama

pytest.importorskip("peft")

OTHERS = ("workloads", "measure", "rows", "markdown", "predictor_text")
MODULES = (*OTHERS, "surrogate_rows", "surrogate_text", "surrogate_models", "surrogate_quality")
pytestmark = pytest.mark.usefixtures("eager_inductor")


@pytest.fixture(scope="module")
def quality(repo_root: Path) -> Iterator[ModuleType]:
    """Import the program as it runs: from its own folder."""
    sys.path.insert(0, str(repo_root / "benchmarks"))
    try:
        yield importlib.import_module("surrogate_quality")
    finally:
        sys.path.remove(str(repo_root / "benchmarks"))
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture
def arguments(quality: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A tiny model, made-up sums and what to call the program with."""
    tiny_llama(layers=3, hidden=256, ffn=512).save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(quality, "load_encoder", lambda _: lambda text: [3 + ord(each) % 90 for each in text])
    for name, count in (("train.jsonl", 4000), ("test.jsonl", 120)):
        sums = [{"question": f"{i}+{i + 1}=", "answer": str(2 * i + 1)} for i in range(count)]
        (tmp_path / name).write_text("".join(json.dumps(each) + "\n" for each in sums), encoding="utf-8")
    files = [f"--data={tmp_path / 'train.jsonl'}", f"--eval-data={tmp_path / 'test.jsonl'}"]
    return [f"--model={tmp_path / 'tiny'}", *files, "--steps=12", f"--out={tmp_path / 'rows.jsonl'}"]


def rows(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_arms_start_alike_and_a_run_that_was_made_is_not_made_again(
    quality: ModuleType, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = "exact,auto:start_step=4;dense_every=4,exact:seed=1"
    assert quality.main([*arguments, f"--arms={arms}", "--seeds=0"]) == 0
    (exact, auto, again) = rows(tmp_path)
    assert exact["loss"] == again["loss"], "the seed of the predictor says nothing under preset exact"
    assert auto["loss"] != exact["loss"], "maps train another function"
    assert str(tmp_path) not in json.dumps([exact, auto]), "rows are kept, and name no folder of a machine"
    quality.main([*arguments, f"--arms={arms}", "--seeds=0"])
    assert len(rows(tmp_path)) == 3
    judged_by = exact["settings"]["eval_data"]
    line = f"| `exact:seed=1` | {judged_by} | {exact['loss']:.4f} | +0.0000 | +0.0000 | - | - |"
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("arm", ["o9", "o2:no_option=1", "o2:end_step=2.5", "o2:end_step=abc", "exact:steps=1.5"])
def test_a_wrong_arm_is_an_error_of_the_command(quality: ModuleType, arguments: list[str], arm: str) -> None:
    with pytest.raises(SystemExit):
        quality.main([*arguments, f"--arms={arm}"])
