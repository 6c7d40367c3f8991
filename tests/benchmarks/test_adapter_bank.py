"""The benchmark of the bank: its tasks, its arms, its tables, and the large bank."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from checkpoints import save_checkpoint
from programs import imported

pytest.importorskip("peft")

MODULES = (
    *("workloads", "measure", "rows", "markdown", "predictor_text", "surrogate_models"),
    *("adapter_bank_tasks", "adapter_bank_rows", "adapter_bank", "adapter_bank_scale"),
)
KINDS = ("pub | price : high", "pub | price : £ 20 - 25", "restaurant | price : high", "restaurant | price : £ 20 - 25")
SIGNS = ("1+2", "2*3", "2*3>> <<1+1", "2*3>> <<2-1")


@pytest.fixture(scope="module")
def modules(repo_root: Path) -> Iterator[dict[str, ModuleType]]:
    with imported(repo_root / "benchmarks", MODULES) as found:
        yield found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of every kind; each meaning has two texts."""
    folder = tmp_path_factory.mktemp("data")
    kinds = [*(f"Type : {kind}" for kind in KINDS), "Type : coffee shop", "food : any"]
    meals = [f"name : {i} | {kind}||w{i} {text}" for kind in kinds for i in range(20) for text in ("w1", "w2")]
    sums = [{"question": f"w{i} {sign}", "answer": f"<<{sign}=9>>"} for sign in SIGNS for i in range(40)]
    (folder / "e2e.txt").write_text("\n".join(meals), encoding="utf-8")
    (folder / "gsm8k.jsonl").write_text("\n".join(json.dumps(each) for each in sums), encoding="utf-8")
    return folder


def test_tasks_are_of_all_kinds_and_questions_are_apart(modules: dict[str, ModuleType], data: Path) -> None:
    texts: list[str] = []

    def encode(text: str) -> list[int]:
        texts.append(text)
        return [len(texts) + 9]

    read = modules["adapter_bank_tasks"].read_tasks
    tasks = read([data / "e2e.txt"], [data / "gsm8k.jsonl"], encode, 1, 2, sizes=(20, 6), longest=50)
    names = [task.name for task in tasks]
    assert len(names) == 14 and names == sorted(names)
    assert {name.split("-")[0] for name in names} == {"e2e", "gsm8k", "made"}
    for task in tasks:
        assert len(task.train) == 20 and len(task.held_out) >= 6
        asked = [{texts[question[1] - 10] for question, _ in part} for part in (task.train, task.held_out)]
        assert not asked[0] & asked[1], task.name
    with pytest.raises(ValueError, match="records, not 900 and 6"):
        read([data / "e2e.txt"], [data / "gsm8k.jsonl"], encode, 1, 2, sizes=(900, 6), longest=50)


def test_a_task_is_left_out_and_trained_on_from_a_composed_adapter(
    modules: dict[str, ModuleType], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program, out = modules["adapter_bank"], tmp_path / "rows.jsonl"
    save_checkpoint(tmp_path / "model", layers=1)
    arguments = [
        *(f"--model={tmp_path / 'model'}", f"--e2e={data / 'e2e.txt'}", f"--gsm8k={data / 'gsm8k.jsonl'}"),
        *(f"--cache={tmp_path / 'cache'}", "--steps=2", "--seeds=0", f"--out={out}", "--distances=kl"),
        *("--tasks=made-sum", "--sweep", "--curves=made-sum"),
    ]
    assert program.main(arguments) == 0
    left_out, sweep, curve = (json.loads(line) for line in out.read_text(encoding="utf-8").splitlines())
    losses: dict[str, Any] = left_out["losses"]
    arms = {
        "base",
        "trained",
        "uniform",
        "nearest",
        "apart",
        *(f"{each}/kl" for each in ("softmin", "standardised", "mlp")),
    }
    assert losses.keys() == arms and len(set(losses.values())) == len(arms)
    assert losses["trained"] < losses["base"]
    assert 0 < left_out["rank_error"] < 1 and left_out["apart_difference"] > 0
    # The whole rank of 13 adapters of rank 8 is 104: with T as chosen, more of the sum is kept by each rank.
    assert [*sweep["ranks"]] == ["4", "8", "16", "32", "104"] and len(set(sweep["ranks"].values())) > 2
    assert len(set(sweep["temperatures"].values())) == 5
    assert curve["cold"].keys() == curve["composed"].keys() == {"0", "2"}
    assert curve["cold"]["0"] == losses["base"] != curve["composed"]["0"]
    assert str(tmp_path) not in json.dumps([left_out, curve]), "rows are kept, and name no folder of a machine"
    program.main(arguments)
    assert len(out.read_text(encoding="utf-8").splitlines()) == 3, "a run that was made is not made again"
    capsys.readouterr()
    document = tmp_path / "document.md"
    document.write_text("<!-- tables of adapter_bank -->\n<!-- end of tables of adapter_bank -->\n", encoding="utf-8")
    assert program.main(["--table", f"--out={out}", f"--document={document}"]) == 0
    printed = capsys.readouterr().out
    assert printed in document.read_text(encoding="utf-8")
    assert f"| base | {losses['base']:.3f} | {losses['base']:.3f} | 0% |" in printed and "| trained |" in printed
    assert f"| made-sum, composed | {curve['composed']['0']:.3f} |" in printed


def test_a_large_bank_is_timed(
    modules: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program, out = modules["adapter_bank_scale"], tmp_path / "rows.jsonl"
    monkeypatch.setattr(program, "LAYERS", {"mlp.up_proj": (48, 32), "mlp.down_proj": (32, 48)})
    monkeypatch.setattr(program, "VOCABULARY", 500)
    assert program.main(["--adapters=6", "--rank=2", f"--folder={tmp_path}", f"--out={out}"]) == 0
    row = json.loads(out.read_text(encoding="utf-8"))
    assert row["adapters"] == 6 and row["exact"] and row["compose_cpu_seconds"] > 0
    assert row["adapter_mb"] == pytest.approx(2 * 2 * 80 * 4 / 1e6)
    assert [each.name for each in tmp_path.iterdir()] == ["rows.jsonl"], "the bank is gone"
    assert "| 6 | 2 | 1 |" in capsys.readouterr().out


def test_memory_that_a_call_takes_is_seen(modules: dict[str, ModuleType]) -> None:
    def take() -> float:
        import time

        held = torch.ones(2**24)
        time.sleep(0.05)
        return float(held.sum())

    found, taken = modules["adapter_bank_scale"]._measured(take)
    assert found == 2**24 and taken["seconds"] >= 0.05 and 60 < taken["mb"] < 90
