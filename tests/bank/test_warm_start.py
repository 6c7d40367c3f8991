"""A training that starts from a composed adapter, by the code of the documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from documents import fences
from models import tiny_llama, with_lora

pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("eager_inductor")


def snippets(repo_root: Path) -> dict[str, Any]:
    """Run the Python of the document; return what it defines."""
    text = (repo_root / "docs" / "adapter_bank.md").read_text(encoding="utf-8")
    found: dict[str, Any] = {}
    for language, body in fences(text):
        if language == "python":
            exec(body, found)
    return found


def test_the_code_of_the_document_runs_from_a_bank_to_a_step(
    repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_llama(layers=2).save_pretrained("base")
    for seed, name in enumerate(("trained", "other")):
        with_lora(tiny_llama(layers=2), seed=seed).save_pretrained(name)
    code = snippets(repo_root)
    code["with_a_bank"]("base", "trained", "other", [[5, 6, 7]], [[5, 7]])
    assert "'sums': 0.5" in capsys.readouterr().out

    model = code["start_from"](tiny_llama(layers=2), "composed")
    ids = torch.randint(97, (2, 12))
    with torch.no_grad():
        composed, plain = model.eval()(ids).logits, tiny_llama(layers=2).eval()(ids).logits
    assert (composed - plain).abs().max() > 1e-3, "it starts from the composed adapter, not from nothing"
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    before = {name: each.detach().clone() for name, each in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=1.0)
    losses = []
    for _ in range(3):
        loss = model.train()(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all((each != before[name]).any() for name, each in trained.items()), "every factor moves"
