"""Merging keeps every zero of a pruned weight, and gives the function that was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import batch, tiny_llama, with_lora
from sparse_compile import merge_masked
from tolerances import assert_close_rms

pytest.importorskip("peft")


def pruned_llama(**options: Any) -> nn.Module:
    """Return a Llama whose attention is pruned to 2:4 and whose feed-forward layers are whole."""
    model = tiny_llama(**options)
    for name, parameter in model.named_parameters():
        if "self_attn" in name:
            groups = parameter.data.reshape(-1, 4)
            groups.scatter_(1, groups.abs().argsort(1)[:, :2], 0.0)
    return model


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name.replace(".base_layer", ""): p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.slow
def test_zeros_survive_training_and_merging(tmp_path: Path) -> None:
    plain = pruned_llama(layers=2)
    before = weights(plain)
    model = with_lora(plain, ("q_proj", "v_proj", "up_proj"))
    model.compile(backend="sparselora", options={"preset": "none", "preserve_weight_mask": "auto"})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    inputs = batch(97)
    losses = []
    for _ in range(200):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    with torch.no_grad():
        trained = model(**inputs).loss
    merged = merge_masked(model)
    after = weights(merged)
    assert after.keys() == before.keys()
    for name, weight in before.items():
        changed = not torch.equal(weight, after[name])
        assert changed == any(target in name for target in ("q_proj", "v_proj", "up_proj")), name
        if "self_attn" in name:
            assert torch.equal(weight == 0, after[name] == 0), name
    # What was merged is what was trained, and it is a plain checkpoint.
    merged.save_pretrained(tmp_path)
    reloaded = type(merged).from_pretrained(tmp_path).train()
    assert_close_rms(reloaded(**inputs).loss, trained, name="loss")


def test_bad_models_are_named_and_left_alone() -> None:
    with pytest.raises(ValueError, match="has none"):
        merge_masked(nn.Linear(3, 4))
    with pytest.raises(ValueError, match=r"threshold must be in \(0, 1\], got 0"):
        merge_masked(with_lora(pruned_llama(layers=1)), threshold=0)
    merged = with_lora(pruned_llama(layers=1))
    merged.merge_adapter()
    with pytest.raises(ValueError, match=r"q_proj cannot be merged: its adapters are merged already"):
        merge_masked(merged)


def test_a_tied_weight_is_declined_before_anything_is_changed() -> None:
    model = with_lora(pruned_llama(layers=1, tied=True), ("q_proj", "lm_head"))
    before = weights(model)
    with pytest.raises(ValueError, match="lm_head cannot be merged: its weight is tied"):
        merge_masked(model)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())
