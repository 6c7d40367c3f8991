"""The options of the backend, from what a command line gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparse_compile import SparseLoRAConfig
from sparse_compile.cli.choices import config_of
from sparse_compile.cli.errors import CommandError


def test_without_a_choice_the_defaults_hold() -> None:
    assert config_of(None, None, None) == SparseLoRAConfig()
    assert config_of("o2", None, None, start_step=0) == SparseLoRAConfig(preset="o2", start_step=0)


def test_a_file_of_options_stands_behind_what_the_line_says(tmp_path: Path) -> None:
    file = tmp_path / "options.json"
    file.write_text(json.dumps({"preset": "o2", "keep_logits": True, "start_step": 3}))
    assert config_of(None, None, str(file)) == SparseLoRAConfig(preset="o2", keep_logits=True, start_step=3)
    assert config_of("exact", None, str(file), start_step=0) == SparseLoRAConfig(
        preset="exact", keep_logits=True, start_step=0
    )


def test_a_published_yaml_is_read(tmp_path: Path) -> None:
    file = tmp_path / "published.yaml"
    file.write_text("sparsity:\n  layers.3.mlp: 0.9\n")
    assert config_of(None, None, str(file)).layer_sparsity == {"layers.3.mlp": 0.9}


@pytest.mark.parametrize(("text", "message"), [("[1]", "a JSON object of options"), ("{", "cannot be read")])
def test_a_file_of_something_else_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "options.json"
    file.write_text(text)
    with pytest.raises(CommandError, match=message):
        config_of(None, None, str(file))


def test_a_wrong_option_of_a_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "options.json"
    file.write_text('{"presets": "o2"}')
    with pytest.raises(ValueError, match="did you mean 'preset'"):
        config_of(None, None, str(file))
