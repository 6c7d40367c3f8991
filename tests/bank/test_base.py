"""What tells one base from another, and what a bank takes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from banks import HIDDEN, LAYERS, VOCABULARY, write_base
from models import tiny_llama
from sparse_compile.bank.base import DIRECTIONS, read_base
from sparse_compile.bank.errors import BankError
from sparse_compile.bank.signs import signs


def test_what_is_read(base: Path) -> None:
    found = read_base(base, ground=True)
    assert read_base(base).points is None
    assert found.vocabulary == VOCABULARY and found.name == "base"
    assert {name: found.shapes[name] for name in LAYERS} == LAYERS
    embedding = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    assert found.points is not None
    torch.testing.assert_close(found.points, embedding @ signs("directions", HIDDEN, DIRECTIONS) / HIDDEN**0.5)


def test_directions_keep_distances_of_tokens() -> None:
    """The mean square over directions is the square of the distance, within a fifth or so for 32 of them."""
    embedding = torch.randn(50, 400)
    points = embedding @ signs("directions", 400, DIRECTIONS) / 400**0.5
    ratios = torch.pdist(points).square() / DIRECTIONS / (torch.pdist(embedding).square() / 400)
    assert abs(ratios.mean().item() - 1) < 0.1 and ratios.std() < 0.4


def test_another_seed_is_another_base_and_a_cast_is_not(base: Path, tmp_path: Path) -> None:
    identity = read_base(base).fingerprint
    assert read_base(write_base(tmp_path / "other", 1)).fingerprint != identity
    weights = load_file(base / "model.safetensors")
    half = tmp_path / "half"
    half.mkdir()
    (half / "config.json").write_text((base / "config.json").read_text())
    save_file({name: each.bfloat16() for name, each in weights.items()}, half / "model.safetensors")
    assert read_base(half).fingerprint == identity


def test_shards_do_not_matter(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = tiny_llama(layers=2)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="50KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = (read_base(tmp_path / name, ground=True) for name in ("one", "many"))
    assert one.fingerprint == many.fingerprint and one.points is not None and one.vocabulary == 97


def test_a_base_without_a_known_embedding_has_no_ground(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    weights["tokens.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, base / "model.safetensors")
    assert read_base(base, ground=True).points is None


def test_the_vocabulary_of_a_model_in_parts(base: Path) -> None:
    (base / "config.json").write_text(json.dumps({"text_config": {"vocab_size": 7}}))
    assert read_base(base).vocabulary == 7


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"vocab_size": 0}', '{"vocab_size": "9"}'])
def test_a_configuration_that_is_none(base: Path, content: str) -> None:
    (base / "config.json").write_text(content)
    with pytest.raises(BankError, match=r"config\.json"):
        read_base(base)


def test_damaged_or_missing_weights_are_named(base: Path) -> None:
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BankError, match=r"model\.safetensors is damaged"):
        read_base(base)
    file.unlink()
    with pytest.raises(BankError, match="save_pretrained"):
        read_base(base)
