"""Make the small Llama of the demo: a word-level tokenizer built on the spot, and about a minute of pre-training."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from sparse_compile.cli.records import Collator, Example, Record, tokenize

from .muon import Muon
from .word_problems import NUMBERS, Problem, generate

MAX_LENGTH = 512
"""Longest sequence the demo's model is made for, in tokens."""


@dataclass(frozen=True)
class DemoSize:
    """How large the demo is.

    Attributes:
        problems: long word problems, for fine-tuning and evaluation; pre-training reads four times as many short ones.
        layers: transformer blocks.
        hidden: width of the residual stream, a multiple of 32; the FFN is four times as wide.
        pretrain_steps: steps of pre-training.
        pretrain_batch: problems in each of them.
        pretrain_lr: peak learning rate of pre-training.
    """

    problems: int = 2400
    layers: int = 8
    hidden: int = 256
    pretrain_steps: int = 64
    pretrain_batch: int = 64
    pretrain_lr: float = 3e-3


def as_records(problems: Iterable[Problem], kind: str) -> list[Record]:
    """Turn word problems into rows of data."""
    return [Record(p.answer, f"{kind}:{i}", prompt=p.question) for i, p in enumerate(problems, start=1)]


def build_tokenizer(problems: Iterable[Problem]) -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per word of the problems."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = {word for problem in problems for word in f"{problem.question} {problem.answer}".split()}
    vocabulary = {word: index for index, word in enumerate([*special, *sorted(words | {str(n) for n in NUMBERS})])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def build_model(size: DemoSize, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build an untrained Llama with grouped-query attention (two query heads for each key and value head)."""
    heads = size.hidden // 32
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=4 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def pretrained(size: DemoSize, seed: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, list[Problem]]:
    """Pre-train a model on short problems.

    Returns:
        The model, its tokenizer, and the long problems (another kind) that are to be learned by fine-tuning.
    """
    set_seed(seed)
    short = generate("owners", 4 * size.problems, seed)
    long = generate("stories", size.problems, seed)
    tokenizer = build_tokenizer([*short, *long])
    model = build_model(size, tokenizer)
    examples, _ = tokenize(as_records(short, "owners"), tokenizer, MAX_LENGTH)
    _pretrain(model, examples, size, Collator(tokenizer.pad_token_id, 1, MAX_LENGTH), seed)
    return model, tokenizer, long


def _pretrain(
    model: LlamaForCausalLM, examples: Sequence[Example], size: DemoSize, collate: Collator, seed: int
) -> None:
    """Train every weight. Muon takes the matrices: it learns these problems in a third of the steps AdamW needs."""
    matrices, others = _split_parameters(model)
    optimizers = [
        Muon(matrices, lr=size.pretrain_lr),
        torch.optim.AdamW(others, lr=size.pretrain_lr, weight_decay=0.0),
    ]
    rng = random.Random(seed)
    model.train()
    with tqdm(total=size.pretrain_steps, desc="pre-training", unit="step") as bar:
        for step in range(size.pretrain_steps):
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = size.pretrain_lr * _trapezoid(step, size.pretrain_steps)
            batch = collate(rng.sample(examples, min(size.pretrain_batch, len(examples))))
            loss = model(**batch).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            bar.update()


def _split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the weights of the linear layers, and all other parameters (norms and the tied embedding)."""
    named = list(model.named_parameters())
    matrices = [parameter for name, parameter in named if parameter.ndim == 2 and "embed" not in name]
    chosen = {id(parameter) for parameter in matrices}
    return matrices, [parameter for _, parameter in named if id(parameter) not in chosen]


def _trapezoid(step: int, steps: int) -> float:
    """Return the learning rate as a part of its peak: ten steps up, level, and down over the second half."""
    return min(1.0, (step + 1) / 10, 0.05 + 2 * (steps - step) / steps)
