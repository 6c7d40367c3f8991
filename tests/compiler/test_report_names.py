"""Names of equal blocks as ranges."""

from __future__ import annotations

import pytest

from sparse_compile.compiler.report_names import at_block, fold, shared_prefix


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("model.layers.3.mlp", ("model.layers.", 3, ".mlp")),
        ("12.mlp", ("", 12, ".mlp")),
        ("body.0", ("body.", 0, "")),
        ("h.1.experts.2.w", ("h.", 1, ".experts.2.w")),
        ("lm_head", ("lm_head", None, "")),
        ("conv2d.weight_3", ("conv2d.weight_3", None, "")),
        ("a.01.b", ("a.01.b", None, "")),
    ],
)
def test_a_name_is_split_at_its_block(name: str, parts: tuple[str, int | None, str]) -> None:
    assert at_block(name) == parts


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        ([f"layers.{block}.mlp" for block in range(16)], ["layers.0-15.mlp"]),
        (["l.3.mlp", "l.0.attn", "l.1.mlp", "l.2.mlp", "l.7.mlp", "l.2.mlp"], ["l.1-3,7.mlp", "l.0.attn"]),
        (["lm_head", "l.4", "embed", "lm_head"], ["lm_head", "l.4", "embed"]),
        ([], []),
    ],
)
def test_folding(names: list[str], folded: list[str]) -> None:
    assert fold(names) == folded


@pytest.mark.parametrize(
    ("names", "prefix"),
    [
        (["base.model.layers.0.mlp", "base.model.layers.1.attn"], "base.model."),
        (["base.model.layers.0.mlp", "base.encoder.layers.1.attn"], "base."),
        (["base.model.layers.0.mlp", "base.lm_head"], "base."),
        (["layers.0.mlp"], ""),
        (["0.mlp", "1.mlp"], ""),
        ([], ""),
    ],
)
def test_what_all_names_begin_with(names: list[str], prefix: str) -> None:
    assert shared_prefix(names) == prefix
