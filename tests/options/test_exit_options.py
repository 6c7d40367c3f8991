"""The option `context_exit`: its values, the presets it goes with, its block, and the dense steps that it brings."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sparse_compile import Recipe, SparseLoRAConfig
from sparse_compile.options.presets import AUTO_DENSE_EVERY, AUTO_EXIT, PRESETS, exit_block

EXACT = ("none", "exact")


@pytest.mark.parametrize("value", [0, 1, 0.0, 0.5, 1.0, 0.123456])
def test_a_depth_is_a_fraction(value: Any) -> None:
    config = SparseLoRAConfig(context_exit=value)
    assert config.context_exit == value and isinstance(config.context_exit, float)
    assert config.exit_depth == value
    assert SparseLoRAConfig.from_options(config.to_options()) == config
    assert hash(config) == hash(SparseLoRAConfig(context_exit=float(value)))


@pytest.mark.parametrize("value", [True, False, math.nan, math.inf, -0.01, 1.001, 2, "x", "0.5", [0.5], (), 0.5j])
def test_other_values_are_errors(value: Any) -> None:
    with pytest.raises(ValueError, match=r"context_exit is a fraction of the depth in \[0, 1\], or None, got"):
        SparseLoRAConfig(context_exit=value)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset: str) -> None:
    """Two presets promise to approximate nothing; at depth 1 there is nothing to approximate."""
    assert SparseLoRAConfig(preset=preset, context_exit=1).exit_depth == 1
    for depth in (0, 0.5, 0.99):
        if preset in EXACT:
            with pytest.raises(ValueError, match=f"context_exit approximates, and preset '{preset}' promises not to"):
                SparseLoRAConfig(preset=preset, context_exit=depth)
        else:
            assert SparseLoRAConfig(preset=preset, context_exit=depth).exit_depth == depth


def test_the_preset_decides_where_nothing_is_said() -> None:
    for preset in PRESETS:
        assert SparseLoRAConfig(preset=preset).exit_depth == (AUTO_EXIT if preset == "auto" else 1)
    for option in ({"layer_sparsity": {}}, {"recipe": Recipe({})}):
        assert SparseLoRAConfig(preset="auto", **option).exit_depth == 1
        assert SparseLoRAConfig(preset="auto", context_exit=0.5, **option).exit_depth == 0.5


@pytest.mark.parametrize(
    ("depth", "count", "block"),
    [
        (1, 4, 4), (1.0, 1, 1), (1, 0, 0), (0.5, 4, 2), (0.5, 3, 2), (0.5, 1, 1), (0.5, 2, 1), (0.5, 0, 0),
        (0.75, 4, 3), (0.25, 4, 1), (0.0, 4, 1), (0.0, 1, 1), (0.01, 32, 1), (0.34, 3, 1), (0.999, 4, 4),
        (0.5, 32, 16), (0.5, 5, 2), (0.5, 7, 4), (0.6, 32, 19),
    ],
)  # fmt: skip
def test_the_block_of_an_exit(depth: float, count: int, block: int) -> None:
    """Context runs through the first block at least, so that each token has read others."""
    assert exit_block(depth, count) == block


def test_an_exit_lies_within_the_stack_and_deeper_with_the_depth() -> None:
    for count in range(1, 40):
        blocks = [exit_block(depth / 100, count) for depth in range(101)]
        assert blocks == sorted(blocks) and blocks[0] == 1 and blocks[-1] == count


@pytest.mark.parametrize(
    ("options", "period"),
    [
        ({}, None),
        ({"context_exit": 1}, None),
        ({"context_exit": 0.5}, AUTO_DENSE_EVERY),
        ({"context_exit": 0}, AUTO_DENSE_EVERY),
        ({"context_exit": 0.5, "dense_every": 3}, 3),
        ({"context_exit": 1, "dense_every": 3}, 3),
        ({"context_exit": 0.5, "layer_sparsity": {"mlp": 0.5}}, AUTO_DENSE_EVERY),
        ({"context_exit": 0.5, "preset": "auto"}, AUTO_DENSE_EVERY),
        ({"context_exit": 0.5, "recipe": Recipe({})}, AUTO_DENSE_EVERY),
    ],
    ids=str,
)
def test_an_exit_brings_dense_steps_to_fit_its_maps_in(options: dict[str, Any], period: int | None) -> None:
    assert SparseLoRAConfig(**options).dense_period == period
