"""The Python blocks of docs/trainers.md run as they stand there, on a small model, and every step is sparse."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from adapter_rows import SITES, peft
from checkpoints import save_checkpoint, write_rows
from documents import fences
from models import batch
from oracle import told
from sparse_compile.kernels.channel_selection import record_channels
from sweeps import sweep

STEPS = 3
"""Optimizer steps of a run: a batch of a trainer's default size has all of the rows, for its default of epochs."""
ROWS = 8
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }} "
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }} <end> {% endgeneration %}"
    "{% else %}{{ message.content }} <end> {% endif %}{% endfor %}"
)


def words(start: int, count: int) -> str:
    return " ".join(f"w{2 + (7 * start + place) % 90}" for place in range(count))


def word_tokenizer() -> Any:
    """A tokenizer with one token for each word of `words`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<end>": 1, **{f"w{index}": index for index in range(2, 97)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", chat_template=CHAT_TEMPLATE
    )


# --- What the blocks are given ----------------------------------------------------------------------------------------


def dataset(*rows: dict[str, Any]) -> Any:
    return pytest.importorskip("datasets").Dataset.from_list(list(rows))


def for_a_trainer(folder: Path) -> dict[str, Any]:
    prompts = [list(range(2, 11 + row)) for row in range(ROWS)]
    rows = [
        {
            "input_ids": [*prompt, 5, 6],
            "attention_mask": [1] * (len(prompt) + 2),
            "labels": [-100] * len(prompt) + [5, 6],
        }
        for prompt in prompts
    ]
    return {"model": peft()(), "tokenizer": word_tokenizer(), "data": dataset(*rows)}


def for_trl(**fields: Callable[[int], Any]) -> Callable[[Path], dict[str, Any]]:
    def build(folder: Path) -> dict[str, Any]:
        pytest.importorskip("trl")
        rows = [{name: value(row) for name, value in fields.items()} for row in range(ROWS)]
        return {"model": peft()(), "tokenizer": word_tokenizer(), "data": dataset(*rows)}

    return build


def prompt(row: int) -> str:
    return words(row, 9 + row) + " "


def chat(row: int) -> list[dict[str, str]]:
    turns = [("user", words(row, 9 + row)), ("assistant", "w5 w6"), ("user", words(row, 5)), ("assistant", "w7")]
    return [{"role": role, "content": content} for role, content in turns]


def for_accelerate(folder: Path) -> dict[str, Any]:
    inputs = batch(97, rows=4 * STEPS, length=12)
    rows = [{name: values[row] for name, values in inputs.items()} for row in range(4 * STEPS)]
    return {"model": peft()(), "loader": torch.utils.data.DataLoader(rows, batch_size=2)}  # type: ignore[arg-type]


def for_llama_factory(folder: Path) -> dict[str, Any]:
    pytest.importorskip("llamafactory", reason="LLaMA-Factory is not installed")
    save_checkpoint(folder / "model", layers=2)
    rows = [{"instruction": words(row, 9 + row), "input": "", "output": "w5 w6"} for row in range(ROWS)]
    write_rows(folder / "rows.json", rows)
    (folder / "dataset_info.json").write_text('{"rows": {"file_name": "rows.json"}}')
    settings = {
        "model_name_or_path": "model", "stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_rank": 4,
        "dataset_dir": ".", "dataset": "rows", "template": "default", "output_dir": "out", "report_to": "none",
        "disable_gradient_checkpointing": True,
    }  # fmt: skip
    return {"settings": settings}


def for_torchtune(folder: Path) -> dict[str, Any]:
    pytest.importorskip("torchtune", reason="torchtune is not installed")
    inputs = batch(97, rows=2, length=12)
    sizes = {
        "vocab_size": 97, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 64, "max_seq_len": 64,
        "intermediate_dim": 128,
    }  # fmt: skip
    return {"sizes": sizes, "loader": [{"tokens": inputs["input_ids"], "labels": inputs["labels"]}] * STEPS}


@dataclass(frozen=True)
class TrainerBlock:
    """A block of the page.

    Attributes:
        heading: the section that it stands in.
        given: makes the names that the section says are given, with a folder for files.
        number: which of the section's blocks it is.
        forwards: training forwards of the run.
        sites: names of the sites that are sparse end in these.
    """

    heading: str
    given: Callable[[Path], dict[str, Any]]
    number: int = 0
    forwards: int = STEPS
    sites: tuple[str, ...] = tuple(SITES)


SFT = for_trl(prompt=prompt, completion=lambda row: "w5 w6")
BLOCKS = {
    "trainer": TrainerBlock("transformers.Trainer", for_a_trainer),
    "sft": TrainerBlock("TRL, SFT", SFT),
    "chat": TrainerBlock("TRL, SFT", for_trl(messages=chat), number=1),
    "packing": TrainerBlock("TRL, SFT", SFT, number=2),
    "dpo": TrainerBlock("TRL, DPO", for_trl(prompt=prompt, chosen=lambda row: "w5 w6", rejected=lambda row: "w7")),
    "accelerate": TrainerBlock("Accelerate", for_accelerate, forwards=2 * STEPS),
    "llama_factory": TrainerBlock("LLaMA-Factory", for_llama_factory),
    "torchtune": TrainerBlock("torchtune", for_torchtune, sites=("layers.0.mlp",)),
}


def python_blocks(page: str) -> dict[str, list[str]]:
    """Return the Python blocks of each section of a page, by its heading."""
    sections = re.split(r"^## (.+)$", page, flags=re.MULTILINE)
    named = zip(sections[1::2], sections[2::2], strict=True)
    return {heading: [body for language, body in fences(text) if language == "python"] for heading, text in named}


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have trainers run on this machine with settings that are a user's: autocast in bf16 needs a GPU or this word."""
    from transformers import TrainingArguments

    after_init = TrainingArguments.__post_init__

    def post_init(arguments: Any) -> None:
        arguments.use_cpu = arguments.disable_tqdm = True
        after_init(arguments)

    monkeypatch.setattr(TrainingArguments, "__post_init__", post_init)


@pytest.mark.parametrize("name", sweep(BLOCKS, "trainer"))
@pytest.mark.usefixtures("on_a_cpu", "eager_inductor")
def test_a_block_of_the_page_trains_sparse_at_every_step(
    name: str, repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = BLOCKS[name]
    code = python_blocks((repo_root / "docs" / "trainers.md").read_text(encoding="utf-8"))[block.heading][block.number]
    monkeypatch.chdir(tmp_path)
    sparsity = {site: SITES[site] for site in block.sites}
    options = {"layer_sparsity": sparsity, "preset": "none", "start_step": 0}
    names = {"options": options, **block.given(tmp_path)}
    with told() as messages, record_channels() as record:
        exec(compile(code, f"trainers.md: {block.heading}", "exec"), names)
    assert messages == []
    assert forwards_by_site(record, block.sites) == dict.fromkeys(block.sites, block.forwards)


def forwards_by_site(record: dict[str, list[Any]], sites: tuple[str, ...]) -> dict[str, int]:
    """Return how often channels were chosen at each site; the two choices of an attention must agree."""
    counts = {site: {len(found) for name, found in record.items() if site in name} for site in sites}
    return {site: min(found, default=0) if len(found) < 2 else -1 for site, found in counts.items()}


def test_every_block_of_the_page_is_run(repo_root: Path) -> None:
    sections = python_blocks((repo_root / "docs" / "trainers.md").read_text(encoding="utf-8"))
    there = {(heading, number) for heading, bodies in sections.items() for number in range(len(bodies))}
    assert there == {(block.heading, block.number) for block in BLOCKS.values()}
