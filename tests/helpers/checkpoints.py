"""Write what a command reads: a tiny model with its tokenizer, an adapter, rows of data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WORDS = " ".join(["Question:", "Answer:", *(f"w{number}" for number in range(40))])


def word_tokenizer(words: str = WORDS) -> Any:
    """A tokenizer with one token for each word, which puts `<s>` in front."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    listed = ["<pad>", "<s>", "</s>", "<unk>", *dict.fromkeys(words.split())]
    vocabulary = {word: index for index, word in enumerate(listed)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def save_checkpoint(folder: Path, **sizes: Any) -> Path:
    """Write a tiny Llama with its tokenizer, as `from_pretrained` reads them, and return the folder."""
    from models import tiny_llama

    tokenizer = word_tokenizer()
    tiny_llama(vocab=len(tokenizer), **sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path) -> Path:
    """Write a LoRA adapter of a model in a folder, with its tokenizer left where it is."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: Sequence[object]) -> Path:
    """Write a .jsonl file; a string is written as it is."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def question_rows(count: int, prompt_words: int = 12) -> list[dict[str, str]]:
    """Questions of several lengths, and answers of two words."""
    words = WORDS.split()[2:]
    return [
        {
            "question": " ".join(words[(row + place) % len(words)] for place in range(prompt_words + row % 3)),
            "answer": f"{words[row % len(words)]} {words[(row + 1) % len(words)]}",
        }
        for row in range(count)
    ]
