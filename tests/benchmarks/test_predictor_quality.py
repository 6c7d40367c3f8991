"""The predictor against the oracle and against chance, on small real models and real text.

The bounds lie well inside what was measured; `docs/predictor.md` has the measurements, also where they are poor.
"""

from __future__ import annotations

import importlib
import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def benchmark(repo_root: Path) -> Iterator[ModuleType]:
    """Import the benchmark as its script does, with its folder on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(repo_root / "benchmarks")
        yield importlib.import_module("predictor_quality")


@pytest.fixture(scope="module")
def text(benchmark: ModuleType) -> ModuleType:
    """Import the part that reads text, which the benchmark has imported."""
    return sys.modules["predictor_text"]


def measured(benchmark: ModuleType, shared_dir: Path, model: str) -> dict[str, list[list[Any]]]:
    """Return for each kind of site, block by block, its probes."""
    folder, data = shared_dir / "models" / model, shared_dir / "data/gsm8k/test.jsonl"
    if not (folder.is_dir() and data.is_file()):
        pytest.skip(f"{model} or GSM8K is not in {shared_dir}")
    kinds: dict[str, list[list[Any]]] = {}
    for (kind, _), sites in benchmark.measure(folder, data, batches=1, batch_size=4).items():
        kinds.setdefault(kind, []).append(sites)
    return kinds


@pytest.fixture(scope="module")
def stories(benchmark: ModuleType, shared_dir: Path) -> dict[str, list[list[Any]]]:
    return measured(benchmark, shared_dir, "stories260K")


@pytest.fixture(scope="module")
def tiny_llama(benchmark: ModuleType, shared_dir: Path) -> dict[str, list[list[Any]]]:
    return measured(benchmark, shared_dir, "tiny-llama-8m")


def mean_quality(
    benchmark: ModuleType, blocks: list[list[Any]], sparsity: float, tokens: str | int, rank: int = 8
) -> Any:
    found = [benchmark.quality(sites, sparsity, [tokens], rank)[0] for sites in blocks]
    q = benchmark.mean_over(found)
    # The measure itself: random channels share k / n with any others.
    assert q.overlap_random == pytest.approx(q.kept / q.channels, abs=0.05)
    return q


@pytest.mark.parametrize(
    ("tokens", "gain", "less_error"), [("mean", 0.04, 0.02), (16, 0.08, 0.04), ("all", 0.08, 0.04)]
)
def test_ffn_channels_of_stories(
    benchmark: ModuleType, stories: dict[str, Any], tokens: str | int, gain: float, less_error: float
) -> None:
    q = mean_quality(benchmark, stories["FFN"], 0.5, tokens)
    assert q.overlap > q.overlap_random + gain
    assert q.error < q.error_random - less_error


@pytest.mark.parametrize("tokens", [16, "all"])
def test_ffn_score_over_tokens_finds_the_strongest_channels(
    benchmark: ModuleType, stories: dict[str, Any], tokens: str | int
) -> None:
    q = mean_quality(benchmark, stories["FFN"], 0.9, tokens)
    assert q.overlap > 2.5 * q.overlap_random


def test_value_channels_of_stories(benchmark: ModuleType, stories: dict[str, Any]) -> None:
    """Overlap alone: this model's values have a flat spectrum, so that a rank of 8 lowers no error here."""
    q = mean_quality(benchmark, stories["V/O"], 0.5, "all")
    assert q.overlap > q.overlap_random + 0.07


def test_query_key_channels_of_stories(benchmark: ModuleType, stories: dict[str, Any]) -> None:
    q = mean_quality(benchmark, stories["Q/K"], 0.5, "all")
    assert q.overlap > 0.85
    assert q.error < q.error_random - 0.1


@pytest.mark.parametrize(("kind", "overlap", "less_error"), [("V/O", 0.68, 0.08), ("Q/K", 0.76, 0.15)])
def test_attention_channels_of_tiny_llama(
    benchmark: ModuleType, tiny_llama: dict[str, Any], kind: str, overlap: float, less_error: float
) -> None:
    q = mean_quality(benchmark, tiny_llama[kind], 0.5, "all")
    assert q.overlap > overlap
    assert q.error < q.error_random - less_error
    # Most of the way from chance to the oracle.
    assert q.error < 0.4 * q.error_random + 0.6 * q.error_oracle


def test_full_rank_is_the_oracle(benchmark: ModuleType, stories: dict[str, Any]) -> None:
    """Values are 32 channels wide, queries and keys no wider than 64: with all singular values nothing is lost."""
    for kind in ("V/O", "Q/K"):
        q = mean_quality(benchmark, stories[kind], 0.5, "all", rank=64)
        assert q.overlap == 1
        assert q.error == pytest.approx(q.error_oracle, rel=1e-5)


# --- The encoder of SentencePiece vocabularies ------------------------------------------------------------------------


def sentencepiece_model(pieces: list[tuple[str, float, int]]) -> bytes:
    """Write a `ModelProto` that holds pieces (text, score, type) alone, each shorter than 128 bytes."""
    model = b""
    for text, score, kind in pieces:
        raw = text.encode()
        piece = bytes([10, len(raw)]) + raw + b"\x15" + struct.pack("<f", score) + bytes([24, kind])
        model += bytes([10, len(piece)]) + piece
    return model


def test_sentencepiece_merges_the_best_pair_first(text: ModuleType) -> None:
    texts = ["▁", "a", "b", "c", "bc", "ab", "▁a", "▁ab"]
    scores = [-9.0, -9.0, -9.0, -9.0, -1.0, -2.0, -3.0, -4.0]
    pieces = [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    pieces += [(text, score, 1) for text, score in zip(texts, scores, strict=True)]
    encode = text.sentencepiece_bpe(sentencepiece_model(pieces))
    ids = {text: 256 + i for i, text in enumerate(texts)}
    # "bc" is merged before "ab" and leaves "▁a"; without "c" the word becomes one piece. Spaces count once.
    assert encode("abc  ab ") == [ids["▁a"], ids["bc"], ids["▁ab"]]
    # A character that is no piece becomes its bytes.
    assert encode("é") == [ids["▁"], 0xC3, 0xA9]


def test_sentencepiece_encodes_stories(text: ModuleType, shared_dir: Path) -> None:
    """The model finds text of its own kind as likely as it should: wrong tokens would cost nats."""
    from transformers import AutoModelForCausalLM

    folder = shared_dir / "models/stories260K"
    if not folder.is_dir():
        pytest.skip(f"stories260K is not in {shared_dir}")
    story = "Once upon a time, there was a little girl named Lily. She loved to play in the park."
    ids = torch.tensor([[1, *text.load_encoder(folder)(story)]])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model(input_ids=ids, labels=ids).loss.item() < 0.5


def test_tables_replace_the_old_ones(benchmark: ModuleType, shared_dir: Path, tmp_path: Path) -> None:
    data, folder = tmp_path / "data.jsonl", shared_dir / "models/stories260K"
    if not folder.is_dir():
        pytest.skip(f"stories260K is not in {shared_dir}")
    data.write_text("".join(json.dumps({"question": "Who is it?", "answer": "Lily."}) + "\n" for _ in range(2)))
    page = tmp_path / "page.md"
    begin, end = "<!-- tables of stories260K -->", "<!-- end of tables of stories260K -->"
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    arguments = ["--model", folder, "--data", data, "--batches", "1", "--batch-size", "2", "--out", page]
    benchmark.main([str(argument) for argument in arguments])
    written = page.read_text()
    assert written.startswith(f"before\n{begin}\n")
    assert written.endswith(f"{end}\nafter\n")
    assert "\nold\n" not in written
    assert "| FFN, 16 tokens | 0.97 | 6/172 |" in written
    data.write_text("")
    with pytest.raises(ValueError, match="only 0 records that fit, not 2"):
        benchmark.main([str(argument) for argument in arguments])
