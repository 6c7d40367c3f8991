"""Load the model of a command: a folder or an id of the hub, with its adapter, or with one that is made for it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparse_compile.cli.errors import CommandError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["DEFAULT_RANK", "DEFAULT_TARGETS", "ModelChoice", "load_model", "load_tokenizer"]

DEFAULT_RANK = 16
DEFAULT_TARGETS = "all-linear"
"""PEFT's name for every linear layer but the head."""

_ADAPTER_FILE = "adapter_config.json"


@dataclass(frozen=True)
class ModelChoice:
    """What the options of a command say of the model.

    Attributes:
        model: a folder, or an id of the hub; a folder with an adapter alone names its base itself.
        adapter: folder or id of a PEFT adapter; None for that of `model`, or else a fresh one.
        dtype: of the frozen weights: a dtype of torch by name, or `"auto"` for that of the files.
        rank: of a fresh adapter.
        targets: names of the layers of a fresh adapter, comma-separated, or `"all-linear"`.
    """

    model: str
    adapter: str | None = None
    dtype: str = "auto"
    rank: int = DEFAULT_RANK
    targets: str = DEFAULT_TARGETS

    @property
    def adapter_source(self) -> str | None:
        """Where the adapter is; None where one is to be made."""
        return self.model if self.adapter is None and (Path(self.model) / _ADAPTER_FILE).is_file() else self.adapter


def load_model(choice: ModelChoice) -> tuple[nn.Module, str]:
    """Load a model for training, on the accelerator if there is one, and say which adapter it has.

    Returns:
        The model, whose adapters alone are trained, and a line about the adapter.

    Raises:
        CommandError: there is no such model or adapter, or it cannot be loaded.
    """
    import transformers
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if choice.adapter_source is not None:
        _check_folder("--adapter", choice.adapter_source, _ADAPTER_FILE)
    base = _base_of(choice)
    _check_folder("--model", base, "config.json")
    # PEFT reads a deprecated attribute of transformers. The bar would stand before the commands' own.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=choice.dtype)
    except (OSError, ValueError, ImportError) as error:
        raise CommandError(
            f"--model {base}: transformers does not load it as a causal language model ({error}). Give a folder that "
            "save_pretrained wrote, or an id of the hub"
        ) from error
    model.config.use_cache = False  # a training step keeps no keys and values
    if choice.adapter_source is None:
        model, told = _with_fresh_adapter(model, choice)
    else:
        try:
            model = PeftModel.from_pretrained(model, choice.adapter_source, is_trainable=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise CommandError(
                f"--adapter {choice.adapter_source}: PEFT does not load it onto {base} ({error}). Give the adapter of "
                "this model"
            ) from error
        told = f"adapter {choice.adapter_source} on {base}"
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return model.to(device).train(), told


def load_tokenizer(choice: ModelChoice) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model; an adapter's own, where its folder has one, goes first.

    Raises:
        CommandError: there is none.
    """
    from transformers import AutoTokenizer

    source = choice.adapter_source
    own = source is not None and (Path(source) / "tokenizer_config.json").is_file()
    place = source if own and source is not None else _base_of(choice)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise CommandError(
            f"{place} has no tokenizer that transformers loads ({error}). Save it there: tokenizer.save_pretrained"
        ) from error
    if tokenizer.eos_token_id is None:
        raise CommandError(f"the tokenizer of {place} has no end token, which ends an answer: set its eos_token")
    return tokenizer


def _base_of(choice: ModelChoice) -> str:
    """Return the folder or the id of the frozen model."""
    if choice.adapter_source != choice.model:
        return choice.model
    from peft import PeftConfig

    base = PeftConfig.from_pretrained(choice.model).base_model_name_or_path
    if not base:
        raise CommandError(
            f"--model {choice.model} is an adapter that names no base: give the base as --model, and it as --adapter"
        )
    return str(base)


def _check_folder(option: str, place: str, file: str) -> None:
    """Raise where a place is a path, and no folder with such a file."""
    folder = Path(place).expanduser()
    if folder.is_dir():
        if not (folder / file).is_file():
            raise CommandError(f"{option} {place}: the folder has no {file}. Give a folder that save_pretrained wrote")
    elif folder.exists() or place.startswith((".", "/", "~")) or place.count("/") > 1:
        raise CommandError(f"{option} {place}: no such folder")


def _with_fresh_adapter(model: Any, choice: ModelChoice) -> tuple[Any, str]:
    from peft import LoraConfig, get_peft_model

    all_layers = choice.targets == DEFAULT_TARGETS
    targets: Any = choice.targets if all_layers else [name.strip() for name in choice.targets.split(",")]
    torch.manual_seed(0)
    try:
        config = LoraConfig(r=choice.rank, lora_alpha=2 * choice.rank, target_modules=targets, task_type="CAUSAL_LM")
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise CommandError(f"{choice.model} takes no such adapter: {error}. Name layers of it by --targets") from error
    where = "every linear layer" if all_layers else ", ".join(targets)
    return adapted, f"the model has no adapter: it gets a LoRA of rank {choice.rank} on {where} (--adapter, --targets)"
