"""The options of the backend, as a command line gives them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparse_compile.cli.errors import CommandError
from sparse_compile.options.config import SparseLoRAConfig

__all__ = ["config_of"]


def config_of(preset: str | None, recipe: str | None, config: str | None, **fixed: Any) -> SparseLoRAConfig:
    """Return the options that `--preset`, `--recipe` and `--config` give, each winning over the one behind it.

    Args:
        preset: name of a preset.
        recipe: as the option `recipe`, such as a folder.
        config: a `.json` file of options, a `.yaml` file of the reference implementation, or a folder (or an id of the
            hub) of a SparseLoRA release.
        **fixed: options that the command sets itself.

    Raises:
        CommandError: `config` is none of these.
        ValueError: a wrong option.
    """
    chosen = {name: value for name, value in (("preset", preset), ("recipe", recipe)) if value is not None} | fixed
    if config is None:
        return SparseLoRAConfig(**chosen)
    path = Path(config)
    if path.suffix in (".yaml", ".yml"):
        return SparseLoRAConfig.from_yaml(path, **chosen)
    if path.suffix != ".json":
        return SparseLoRAConfig.from_pretrained(config, **chosen)
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CommandError(f"--config {config} cannot be read: {error}. Give a JSON object of options") from error
    if not isinstance(options, dict):
        raise CommandError(f'--config {config}: a JSON object of options, such as {{"preset": "o2"}}, is expected')
    return SparseLoRAConfig.from_options({**options, **chosen})
