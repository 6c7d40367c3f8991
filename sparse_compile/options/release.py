"""Read the files that the reference implementation of SparseLoRA publishes (github.com/z-lab/sparselora).

Two generations are in use: a folder with ``config.json`` and ``model.safetensors`` (also on the Hugging Face hub), and
before it one YAML file per model and task. Both are translated into plain fields of
:class:`sparse_compile.options.config.SparseLoRAConfig`, which checks the values. The factors themselves are read by
:func:`sparse_compile.predictor.published.load_upstream_factors`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIG_FILE = "config.json"
FACTORS_FILE = "model.safetensors"

_YAML_KEYS = frozenset(
    {
        "ffn_sparsity",
        "layer_sparsity",
        "end_step",
        "mlp_seq_avg",
        "mode",
        "path",
        "predictor_rank",
        "qkvo_sparsity",
        "skip_output_tokens",
        "skip_random_tokens",
        "sparsity",
        "start_step",
    }
)


def read_release(path: str | os.PathLike[str], mode: str, *, factors: bool) -> dict[str, Any]:
    """Return the fields that one mode of a release sets.

    Args:
        path: A local folder, or the id of a repository on the Hugging Face hub, which is downloaded.
        mode: One of the ``modes`` of its ``config.json``.
        factors: Whether ``model.safetensors`` is wanted too.

    Raises:
        ValueError: No such folder, file or mode, or a file that is not of this kind.
        ImportError: ``path`` is a hub id and ``huggingface_hub`` is not installed.
    """
    folder = _local_folder(os.fspath(path), [CONFIG_FILE, FACTORS_FILE] if factors else [CONFIG_FILE])
    file = folder / CONFIG_FILE
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no {CONFIG_FILE}") from None
    except ValueError as error:
        raise ValueError(f"{file} is not a JSON file: {error}") from error
    modes = data.get("modes") if isinstance(data, dict) else None
    if not isinstance(modes, dict):
        raise ValueError(f"{file} has no 'modes': not the {CONFIG_FILE} of a SparseLoRA release")
    if mode not in modes:
        raise ValueError(f"{file} has no mode {mode!r}; it has {', '.join(map(repr, modes)) or 'none'}")
    if not isinstance(modes[mode], dict) or "layer_sparsity" not in modes[mode]:
        raise ValueError(f"{file}: mode {mode!r} has no 'layer_sparsity'")
    fields = {"layer_sparsity": modes[mode]["layer_sparsity"]}
    if "predictor_rank" in data:
        fields["predictor_rank"] = data["predictor_rank"]
    if factors:
        if not (folder / FACTORS_FILE).is_file():
            raise ValueError(f"{folder} holds no {FACTORS_FILE}; predictor_path=None computes the factors instead")
        fields["predictor_path"] = str(folder / FACTORS_FILE)
    return fields


def _local_folder(path: str, wanted: list[str]) -> Path:
    """Return the folder itself, or the one that the hub's repository of this id was downloaded to."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or path.startswith(".") or path.count("/") > 1:
        raise ValueError(f"no such folder: {path}")
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise ImportError(f"{path!r} is no local folder; to read it from the hub, install huggingface_hub") from error
    try:
        return Path(huggingface_hub.snapshot_download(path, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ValueError(f"{path!r} is no local folder, and the hub does not give it: {error}") from error


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the fields that an upstream YAML file sets.

    Its keys, of which only the first must be there:

    * ``sparsity`` (in later files ``layer_sparsity``): site name suffix to sparsity, such as ``layers.17.mlp: 0.97``;
    * ``mode``: ``svd_<rank>``, or ``dense``, where no site is sparse whatever ``sparsity`` says; in later files
      ``predictor_rank``;
    * ``start_step``, ``end_step``: up to 1 a fraction of the run (``1``, an integer, too), above 1 optimizer steps;
    * ``skip_output_tokens: false`` is ``token_selection="all_sparse"``, ``skip_random_tokens: true`` is
      ``"random_dense"``;
    * ``mlp_seq_avg``: ``true`` is ``predictor_tokens="mean"``, ``false`` is ``"all"``;
    * ``path``: local folder or file of the factors (``predictor_path``);
    * ``ffn_sparsity``, ``qkvo_sparsity``: summaries for the reader, which upstream does not use either.

    Raises:
        ValueError: The file is absent or not of this kind, or a key is unknown.
    """
    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {os.fspath(path)}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{os.fspath(path)} is not a YAML file: {error}") from error
    try:
        return _fields_of_yaml(data)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error


def _fields_of_yaml(data: object) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ValueError("not a mapping of settings")
    unknown = [key for key in data if key not in _YAML_KEYS]
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}. Known: {', '.join(sorted(_YAML_KEYS))}")
    if ("sparsity" in data) == ("layer_sparsity" in data):
        raise ValueError("exactly one of 'sparsity' and 'layer_sparsity' must be there")
    sparsity = data.get("sparsity", data.get("layer_sparsity"))
    if not isinstance(sparsity, Mapping):
        raise ValueError("the sparsities must map site names to numbers")
    fields: dict[str, Any] = {"layer_sparsity": sparsity}
    mode = data.get("mode")
    if mode == "dense":
        fields["layer_sparsity"] = dict.fromkeys(sparsity, 0.0)
    elif mode is not None:
        kind, _, rank = str(mode).partition("_")
        if kind != "svd" or not rank.isdecimal():
            raise ValueError(f"mode must be 'dense' or 'svd_<rank>', got {mode!r}")
        fields["predictor_rank"] = int(rank)
    for key, field in (("predictor_rank", "predictor_rank"), ("path", "predictor_path")):
        if data.get(key) is not None:
            fields[field] = data[key]
    for key in ("start_step", "end_step"):
        if data.get(key) is not None:
            fields[key] = _step(key, data[key])
    if not _flag(data, "skip_output_tokens", default=True):
        fields["token_selection"] = "all_sparse"
    if _flag(data, "skip_random_tokens", default=False):
        fields["token_selection"] = "random_dense"
    if "mlp_seq_avg" in data:
        fields["predictor_tokens"] = "mean" if _flag(data, "mlp_seq_avg", default=True) else "all"
    return fields


def _flag(data: Mapping[str, object], key: str, *, default: bool) -> bool:
    value = data.get(key, default)
    if not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false, got {value!r}")
    return value


def _step(key: str, value: object) -> float | int | None:
    """Translate a step as upstream reads it: up to 1 a fraction, above 1 a count; the end of the run means never."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key} must be a number, got {value!r}")
    if value > 1:
        if value != value // 1:
            raise ValueError(f"{key} above 1 is a whole number of steps, got {value!r}")
        return int(value)
    return None if key == "end_step" and value == 1 else float(value)
