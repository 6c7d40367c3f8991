"""The workloads: a Llama with LoRA adapters and random weights, and one batch of prompts with answers."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

IGNORE_INDEX = -100
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Workload:
    """The sizes of one training step, and the preset that the SparseLoRA paper would use on such data.

    Attributes:
        name: which named workload it is, or is derived from.
        preset: of `SparseLoRAConfig`.
        output: labelled tokens at the end of each sequence; those before them are the prompt.
        layers: transformer blocks.
        hidden: width of the residual stream.
        ffn: width of the feed-forward intermediate.
        heads: query heads.
        kv_heads: key and value heads.
        vocab: rows of the embedding and of the LM head.
        batch: sequences.
        length: tokens of a sequence.
        rank: rank of the adapters.
        targets: linear layers that carry adapters.
        dtype: key of `DTYPES`; of the frozen weights. PEFT keeps adapters in fp32.
        checkpointing: whether each block is recomputed in the backward.
    """

    name: str
    preset: str
    output: int
    layers: int = 16
    hidden: int = 1024
    ffn: int = 3584
    heads: int = 16
    kv_heads: int = 4
    vocab: int = 16384
    batch: int = 2
    length: int = 512
    rank: int = 32
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    dtype: str = "fp32"
    checkpointing: bool = False

    def __post_init__(self) -> None:
        sizes = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.type == "int"}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if self.output > self.length:
            raise ValueError(f"output ({self.output}) is larger than length ({self.length})")
        if self.hidden % self.heads or self.heads % self.kv_heads:
            raise ValueError(
                f"heads ({self.heads}) must divide hidden, and kv_heads ({self.kv_heads}) must divide heads"
            )

    @property
    def label(self) -> str:
        """The name, with every size that is not the named workload's: `"math10k-mini layers=4"`."""
        named = WORKLOADS[self.name]
        changed = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != getattr(named, f.name)]
        return " ".join([self.name, *(f"{name}={getattr(self, name)}" for name in changed)])


LLAMA_8B: dict[str, Any] = {
    "layers": 32, "hidden": 4096, "ffn": 14336, "heads": 32, "kv_heads": 8, "vocab": 128256, "batch": 8,
    "dtype": "bf16",
}  # fmt: skip
"""Sizes of Llama-3-8B and its batch: for a GPU."""

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("math10k-mini", preset="o2", output=128),
        Workload("csr-mini", preset="o1", output=3),
        Workload("math10k-8b", preset="o2", output=128, **LLAMA_8B),
        Workload("csr-8b", preset="o1", output=3, **LLAMA_8B),
    )
}

QUICK_SIZES = {"layers": 4, "hidden": 512, "ffn": 1792, "heads": 8, "kv_heads": 2, "vocab": 4096}
"""What `--quick` replaces: everything runs in under two minutes on two cores, and nothing of it is a result."""


def base_model(workload: Workload) -> nn.Module:
    """Build the model without adapters."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=workload.vocab,
        hidden_size=workload.hidden,
        intermediate_size=workload.ffn,
        num_hidden_layers=workload.layers,
        num_attention_heads=workload.heads,
        num_key_value_heads=workload.kv_heads,
        max_position_embeddings=workload.length,
        attn_implementation="sdpa",
        use_cache=False,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=DTYPES[workload.dtype])


def adapted_model(base: nn.Module, workload: Workload, *, dora: bool = False) -> nn.Module:
    """Put adapters on a copy of the base that shares its weights: any number of arms costs the memory of one."""
    from peft import LoraConfig, get_peft_model

    weights = [*base.parameters(), *base.buffers()]
    copied = copy.deepcopy(base, memo={id(weight): weight for weight in weights})
    torch.manual_seed(0)
    config = LoraConfig(
        r=workload.rank,
        lora_alpha=2 * workload.rank,
        target_modules=list(workload.targets),
        task_type="CAUSAL_LM",
        use_dora=dora,
    )
    model = get_peft_model(copied, config).train()
    if workload.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # What only re-entrant checkpointing needs would cut the graph.
        model.disable_input_require_grads()
    return model


def make_batch(workload: Workload) -> dict[str, Tensor]:
    """Draw `input_ids` (B, S), and `labels` of the last `output` tokens of each sequence."""
    torch.manual_seed(0)
    input_ids = torch.randint(workload.vocab, (workload.batch, workload.length))
    labels = input_ids.clone()
    labels[:, : workload.length - workload.output] = IGNORE_INDEX
    return {"input_ids": input_ids, "labels": labels}
