"""The parts of the benchmark of surrogates: its text, its models, its arms, and the tables of its rows."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from models import tiny_llama

pytest.importorskip("peft")

OTHERS = ("workloads", "measure", "rows", "markdown", "predictor_text")
MODULES = (*OTHERS, "surrogate_rows", "surrogate_text", "surrogate_models", "surrogate_quality")
pytestmark = pytest.mark.usefixtures("eager_inductor")

BOS, EOS = 1, 2
SHOTS = [([BOS, 10 + i, 20 + i], [30 + i, 40 + i, EOS]) for i in range(5)]
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 8, "max_position_embeddings": 64}


class Parts(NamedTuple):
    """The modules of the benchmark."""

    rows: ModuleType
    text: ModuleType
    models: ModuleType
    quality: ModuleType


@pytest.fixture(scope="module")
def parts(repo_root: Path) -> Iterator[Parts]:
    """Import the program and its parts as it does: from their own folder."""
    sys.path.insert(0, str(repo_root / "benchmarks"))
    try:
        yield Parts(*(importlib.import_module(name) for name in MODULES[len(OTHERS) :]))
    finally:
        sys.path.remove(str(repo_root / "benchmarks"))
        for name in MODULES:
            sys.modules.pop(name, None)


# --- Text -------------------------------------------------------------------------------------------------------------


def test_a_mixture_has_as_many_records_of_each_file(parts: Parts, tmp_path: Path) -> None:
    files = [tmp_path / "sums.jsonl", tmp_path / "meals.txt"]
    files[0].write_text(json.dumps({"question": "1", "answer": "22"}) + "\n", encoding="utf-8")
    files[1].write_text("333||4444\n5||6\n", encoding="utf-8")
    found = parts.text.read_mixture(files, lambda text: [len(text)], tiny_llama(layers=1).config, 2, 99)
    assert found == [([BOS, 1], [2, EOS]), ([BOS, 3], [4, EOS])]


def test_a_larger_share_of_context_is_a_prompt_of_other_records(parts: Parts) -> None:
    changed = parts.text.with_context_share(SHOTS, 0.75, SHOTS, 99)
    for (question, answer), (before, asked) in zip(changed, SHOTS, strict=True):
        assert answer == asked[-3:] and len(question) == 9, "three of four tokens are context"
        assert question[0] == BOS and question[-3:] == before
        assert before[1] not in question[:-3], "the record does not stand in its own prompt"
    assert parts.text.context_share(changed) == 0.75
    assert parts.text.with_context_share(SHOTS, 0.5, SHOTS, 99) == SHOTS, "they have it already"
    assert parts.text.with_context_share(SHOTS, 0.75, SHOTS, 11) == [], "longer than the model takes"


def test_a_smaller_share_of_context_labels_the_end_of_the_question(parts: Parts) -> None:
    changed = parts.text.with_context_share(SHOTS, 1 / 3, SHOTS, 99)
    assert [question + answer for question, answer in changed] == [question + answer for question, answer in SHOTS]
    assert parts.text.context_share(changed) == pytest.approx(1 / 3)


def test_no_share_can_be_had_of_records_with_one_question(parts: Parts) -> None:
    with pytest.raises(ValueError, match="two questions"):
        parts.text.with_context_share(SHOTS[:1] * 3, 0.9, SHOTS[:1] * 3, 99)


# --- Arms -------------------------------------------------------------------------------------------------------------


def test_the_control_trains_as_if_there_were_no_context(parts: Parts) -> None:
    """What is compiled has the loss that the eager model has where nothing but BOS stands before an answer."""
    model = tiny_llama(layers=1)
    hidden = parts.text.hide_context(parts.quality.pad(SHOTS[:2]))
    assert hidden.attention_mask.tolist() == [[1, 0, 0, 1, 1, 1]] * 2
    call = torch.compile(model, backend="sparselora", options=parts.quality.Arm.parse("blind").options)
    other = [([BOS, 50, 60], answer) for _, answer in SHOTS[:2]]
    unseen = parts.text.hide_context(parts.quality.pad(other))
    labels = hidden.labels.clone()
    labels[:, 3] = -100  # the last token of the question, which sees itself, predicts it
    losses = [call(**{**vars(batch), "labels": labels}).loss for batch in (hidden, unseen)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    assert losses[0].item() == pytest.approx(model(**{**vars(hidden), "labels": labels}).loss.item(), rel=1e-5)


def test_an_arm_may_take_fewer_steps(parts: Parts) -> None:
    arm = parts.quality.Arm.parse("exact:steps=0.4;keep_logits=True")
    assert arm == parts.quality.Arm({"preset": "exact", "keep_logits": True}, 0.4, blind=False)
    assert parts.quality.Arm.parse("blind") == parts.quality.Arm({"preset": "exact"}, 1, blind=True)


def test_the_learning_rate_shrinks_with_the_steps(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    rates = []

    class Optimizer(torch.optim.SGD):
        def __init__(self, trained: Sequence[torch.nn.Parameter], lr: float, weight_decay: float) -> None:
            super().__init__(trained, lr=lr, weight_decay=weight_decay)

        def step(self) -> None:  # type: ignore[override]
            rates.append(self.param_groups[0]["lr"])

    class Returned(NamedTuple):
        loss: torch.Tensor

    monkeypatch.setattr(torch.optim, "AdamW", Optimizer)
    parts.models.descend(lambda **_: Returned(weight.sum()), [weight], [SHOTS] * 4, parts.quality.pad, 1.0, rise=2)
    assert rates == [0.5, 0.75, 0.5, 0.25]


# --- Models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt_neox", "qwen2"])
def test_a_model_is_pretrained_once_and_gets_adapters(
    parts: Parts, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(parts.models, "SIZES", SIZES)
    like = tiny_llama(layers=1).config
    folder, again = (parts.models.pretrained(architecture, like, SHOTS, 2, tmp_path / "cache") for _ in range(2))
    assert folder == again and [*folder.parent.iterdir()] == [folder]
    assert capsys.readouterr().out.count("pre-trained for 2 steps") == 1
    assert parts.models.pretrained(architecture, like, SHOTS[1:], 2, folder.parent) != folder, "other text"
    model = parts.models.load(folder)
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    every = parts.models.target_modules(architecture, "all")
    assert {*every} == names - {"lm_head"}
    assert {*parts.models.target_modules(architecture, "attention")} < {*every}
    if architecture == "qwen2":
        assert model.model.layers[0].self_attn.k_proj.weight.shape[0] < 32, "grouped heads"


def test_a_made_model_is_tuned_on_a_mixture_and_judged_by_each_file(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts.models, "SIZES", SIZES)
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    monkeypatch.setattr(parts.quality, "load_encoder", lambda _: lambda text: [3 + ord(each) % 90 for each in text])
    tiny_llama(layers=1).save_pretrained(tmp_path / "tiny")
    files = {"data": [], "eval-data": []}
    for kind, count in (("data", 2000), ("eval-data", 120)):
        for sign in "+-":
            files[kind].append(tmp_path / f"{kind}{sign}.txt")
            files[kind][-1].write_text("".join(f"{i}{sign}{i}=||{2 * i}\n" for i in range(count)), encoding="utf-8")
    given = [f"--{kind}={','.join(map(str, found))}" for kind, found in files.items()]
    given += [f"--model={tmp_path / 'tiny'}", "--architecture=gpt_neox", "--pretrain-steps=1", "--seeds=0"]
    given += ["--arms=blind:steps=0.5", "--steps=4", "--context-share=0.8"]
    out = tmp_path / "rows.jsonl"
    with pytest.raises(SystemExit):
        parts.quality.main([*given, f"--out={out}"])
    parts.quality.main([*given, f"--out={out}", f"--cache={tmp_path / 'cache'}"])
    row = json.loads(out.read_text(encoding="utf-8"))
    assert [*row["losses"]] == row["settings"]["eval_data"].split(",")
    assert row["loss"] == pytest.approx(sum(row["losses"].values()) / 2)
    assert (row["settings"]["context_share"], row["settings"]["pretrain_steps"]) == (0.8, 1)
    assert row["context"] == pytest.approx(0.8, abs=0.02)
    assert str(tmp_path) not in json.dumps(row)


# --- Rows and tables --------------------------------------------------------------------------------------------------


def test_a_row_without_the_later_settings_has_their_defaults(parts: Parts) -> None:
    given = {"model": "tiny", "data": "e2e/train.txt,sums/train.jsonl"}
    assert parts.rows.settings_of({"settings": given}).eval_data == "e2e/test.txt,sums/test.jsonl"
    assert parts.rows.settings_of({"settings": given}) == parts.rows.Settings(**given, context_share=None)


def rows_of(losses: dict[tuple[str, int], float]) -> list[dict[str, Any]]:
    settings = {"model": "tiny", "data": "e2e/train.txt", "targets": "all"}
    given = [{"settings": settings, "arm": arm, "seed": seed, "loss": loss} for (arm, seed), loss in losses.items()]
    return [{**row, "step_seconds": 0.25} for row in given]


def test_differences_are_paired_by_seed_and_set_beside_the_control(parts: Parts) -> None:
    losses = {("exact", 0): 2.0, ("exact", 1): 3.0, ("o2", 0): 2.5, ("o2", 1): 3.1, ("blind", 0): 4.0}
    _, o2, blind = parts.rows.cells(rows_of(losses))
    differences = ["2.5000, 3.1000", "+0.5000, +0.1000", "+0.3000"]
    assert o2 == ["`o2`", "e2e/test.txt", *differences, "0.7071", "25%", "0.250 s"]
    assert blind[2:] == ["4.0000, -", "+2.0000, -", "+2.0000", "0.7071", "100%", "0.250 s"]


def test_each_held_out_file_and_each_settings_stand_apart(parts: Parts) -> None:
    mixed = rows_of({("exact", 0): 2.0})[0]
    mixed = {**mixed, "settings": {**mixed["settings"], "eval_data": "a,b"}, "losses": {"a": 1.0, "b": 3.0}}
    assert [line[1:3] for line in parts.rows.cells([mixed])] == [["a", "1.0000"], ["b", "3.0000"]]
    text = parts.rows.tables([*rows_of({("auto", 3): 2.0}), mixed])
    assert "tiny, e2e/train.txt, adapters on all; seeds 3\n" in text
    assert "tiny, e2e/train.txt, adapters on all, eval_data=a,b; seeds 0\n" in text
    assert "| `auto` | e2e/test.txt | 2.0000 | - | - | - | - | 0.250 s |" in text, "no dense run to compare with"
