"""Build the tiny models and batches of the suite: seeded, with weights that are far from any degenerate case."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from decoder import (
    ALL_TARGETS,
    ATTENTION_TARGETS,
    FFN_TARGETS,
    DecoderConfig,
    Fp64Decoder,
    LoRALinear,
    fill_normal,
    fp64_decoder,
    randomize,
    variants,
)
from sparse_compile.reference import MaskedAttention, MaskedFFN, expand_kv_channels

__all__ = [
    "ALL_TARGETS",
    "ATTENTION_TARGETS",
    "BATCHES",
    "FFN_TARGETS",
    "DeadChannelDecoder",
    "DecoderConfig",
    "Fp64Decoder",
    "Kept",
    "LoRALinear",
    "all_kept",
    "batch",
    "fp64_decoder",
    "gradients",
    "low_rank_dead_channel_decoder",
    "masked_sites",
    "normal",
    "random_kept",
    "random_mask",
    "randomize",
    "tiny_llama",
    "variants",
    "with_lora",
]

BATCHES: dict[str, dict[str, Any]] = {
    "ragged": {},
    "left": {"padding": "left"},
    "right": {"padding": "right"},
    "packed": {"packed": True},
}
"""Every shape of batch, as keyword arguments of `batch`."""

Kept = Mapping[str, "Tensor | tuple[Tensor, Tensor]"]
"""Kept channels by site name: indices for an `...mlp`, a pair (qk, vo) for a `...self_attn`."""


# --- Hugging Face -----------------------------------------------------------------------------------------------------


def tiny_llama(
    layers: int = 3,
    hidden: int = 64,
    ffn: int = 96,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 97,
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = False,
    tied: bool = False,
    attention: str = "sdpa",
    seed: int = 0,
) -> nn.Module:
    """A `LlamaForCausalLM` in training mode. In fp64 its norms still compute in fp32: compare to 1e-5."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=512,
        attention_bias=bias,
        mlp_bias=bias,
        tie_word_embeddings=tied,
        attn_implementation=attention,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    randomize(model, seed)
    return model.to(dtype).train()


def with_lora(
    model: nn.Module,
    targets: Sequence[str] = ATTENTION_TARGETS,
    r: int = 4,
    alpha: float = 8,
    dropout: float = 0.0,
    b_scale: float = 0.1,
    seed: int = 1,
    dora: bool = False,
) -> nn.Module:
    """Add PEFT adapters whose B is not zero, as after some training: otherwise half of their gradients vanish."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(targets),
        use_dora=dora,
        # What this adds is for models that generate.
        task_type="CAUSAL_LM" if hasattr(model, "generate") else None,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        peft_model = get_peft_model(model, config)
    for name, parameter in peft_model.named_parameters():
        if "lora_A" in name:
            fill_normal(parameter, parameter.shape[1] ** -0.5, generator)
        elif "lora_B" in name:
            fill_normal(parameter, b_scale, generator)
        elif "magnitude" in name:
            # PEFT starts with the norm of the frozen row, so that the channel's scale would be nearly 1.
            scales = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) + 0.5
            parameter.data.mul_(scales.to(parameter.dtype))
    return peft_model.train()


# --- Dead channels ----------------------------------------------------------------------------------------------------


class DeadChannelDecoder(NamedTuple):
    """A decoder for which dropping all channels but `kept` changes nothing."""

    model: Fp64Decoder
    kept: dict[str, Tensor | tuple[Tensor, Tensor]]


@torch.no_grad()
def low_rank_dead_channel_decoder(
    config: DecoderConfig | None = None, *, kept_ffn: int = 6, kept_kv: int = 5, rank: int = 8
) -> DeadChannelDecoder:
    """A decoder whose frozen projections have rank <= `rank` and whose dropped channels are exactly zero.

    Adapters on the FFN are silent in its dead channels, for those belong to the layer; the adapters of attention stay
    dense and are untouched. The region must map zero to zero.
    """
    config = config or DecoderConfig()
    model = Fp64Decoder(config)
    generator = torch.Generator().manual_seed(config.seed + 1)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "_proj" in name:
            outputs, inputs = module.weight.shape
            left, right = torch.empty(outputs, rank), torch.empty(rank, inputs)
            fill_normal(left, (rank * inputs) ** -0.5, generator)
            fill_normal(right, 1.0, generator)
            module.weight.copy_(left.to(config.dtype) @ right.to(config.dtype))
    kept: dict[str, Tensor | tuple[Tensor, Tensor]] = {}
    kv_width, groups = config.kv_heads * config.head_dim, config.heads // config.kv_heads
    for i, layer in enumerate(model.layers):
        ffn, qk, vo = (
            torch.randperm(width, generator=generator)[:count].sort().values
            for width, count in ((config.ffn, kept_ffn), (kv_width, kept_kv), (kv_width, kept_kv))
        )
        for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
            _kill(projection, ffn, outputs=True, adapter=True)
        _kill(layer.mlp.down_proj, ffn, outputs=False, adapter=True)
        attention = layer.self_attn
        _kill(attention.q_proj, expand_kv_channels(qk, config.head_dim, groups), outputs=True, adapter=False)
        _kill(attention.k_proj, qk, outputs=True, adapter=False)
        _kill(attention.v_proj, vo, outputs=True, adapter=False)
        _kill(attention.o_proj, expand_kv_channels(vo, config.head_dim, groups), outputs=False, adapter=False)
        kept[f"layers.{i}.mlp"] = ffn
        kept[f"layers.{i}.self_attn"] = (qk, vo)
    return DeadChannelDecoder(model, kept)


def _kill(projection: nn.Module | None, kept: Tensor, *, outputs: bool, adapter: bool) -> None:
    """Zero all output rows (or input columns) but the kept ones."""
    if projection is None:
        return
    base = projection.base_layer if isinstance(projection, LoRALinear) else projection
    dead = torch.ones(base.weight.shape[0 if outputs else 1], dtype=torch.bool)
    dead[kept] = False
    if outputs:
        base.weight[dead] = 0
        if base.bias is not None:
            base.bias[dead] = 0
    else:
        base.weight[:, dead] = 0
    if adapter and isinstance(projection, LoRALinear):
        if outputs:
            projection.lora_B[dead] = 0
        else:
            projection.lora_A[:, dead] = 0


# --- Sites ------------------------------------------------------------------------------------------------------------


def masked_sites(model: nn.Module, kept: Kept) -> list[MaskedFFN | MaskedAttention]:
    """Describe sites to the oracle by name suffix, for Llama (with or without PEFT) and `Fp64Decoder` alike."""
    modules = dict(model.named_modules())
    sites: list[MaskedFFN | MaskedAttention] = []
    for suffix, channels in kept.items():
        (site,) = (module for name, module in modules.items() if f".{name}".endswith(f".{suffix}"))
        if isinstance(channels, Tensor):
            sites.append(MaskedFFN(site.down_proj, channels))
        else:
            projections = (site.q_proj, site.k_proj, site.v_proj, site.o_proj)
            sites.append(MaskedAttention(*projections, *channels, site.head_dim, site.num_key_value_groups))
    return sites


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Take (and clear) the gradient of every trained parameter, by name; zeros where none arrived."""
    taken = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            taken[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = None
    return taken


# --- Batches ----------------------------------------------------------------------------------------------------------


def batch(
    vocab: int,
    rows: int = 3,
    length: int = 16,
    *,
    padding: str | None = None,
    packed: bool = False,
    prompts: Iterable[int] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Draw `input_ids`, and `labels` that are -100 on prompts and padding; each prompt has a length of its own.

    Args:
        vocab: Ids are drawn from 1..vocab - 1; padding is 0.
        rows: B.
        length: S.
        padding: "left" or "right" adds an `attention_mask`, with row 0 at full length and the others shorter.
        packed: Two or three examples per row and `position_ids` that restart with each.
        prompts: Prompt length of each row, instead of drawn ones (not when packed).
        seed: Of the ids and of all lengths.
    """
    if padding not in (None, "left", "right") or (packed and (padding or prompts)):
        raise ValueError("padding is None, 'left' or 'right'; packed rows have neither padding nor given prompts")
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, max(high, low) + 1, (), generator=generator))

    input_ids = torch.randint(1, vocab, (rows, length), generator=generator)
    labels = input_ids.clone()
    attention_mask = torch.ones_like(input_ids)
    position_ids = torch.arange(length).repeat(rows, 1)
    given = None if prompts is None else list(prompts)
    for row in range(rows):
        if packed:
            cuts = [0, length // 3 + draw(0, 1), 2 * length // 3 + draw(0, 1), length]
            if row % 2:
                del cuts[draw(1, 2)]
            spans = list(pairwise(cuts))
        else:
            size = length if padding is None or row == 0 else draw(length // 2, length - 1)
            start = length - size if padding == "left" else 0
            spans = [(start, start + size)]
            outside = torch.ones(length, dtype=torch.bool)
            outside[start : start + size] = False
            input_ids[row, outside], labels[row, outside], attention_mask[row, outside] = 0, -100, 0
        for start, stop in spans:
            prompt = given[row] if given is not None else draw((stop - start) // 4, 3 * (stop - start) // 4)
            labels[row, start : start + prompt] = -100
            position_ids[row, start:stop] = torch.arange(stop - start)
    result = {"input_ids": input_ids, "labels": labels}
    if padding is not None:
        result["attention_mask"] = attention_mask
    if packed:
        result["position_ids"] = position_ids
    return result


def random_kept(config: DecoderConfig, layers: Iterable[int], *, ffn: int = 7, kv: int = 5, seed: int = 0) -> Kept:
    """Draw kept channels at random for the FFN and the attention of the named layers."""
    generator = torch.Generator().manual_seed(seed)

    def choose(width: int, count: int) -> Tensor:
        return torch.randperm(width, generator=generator)[:count].sort().values

    kv_width = config.kv_heads * config.head_dim
    kept: dict[str, Tensor | tuple[Tensor, Tensor]] = {}
    for i in layers:
        kept[f"layers.{i}.mlp"] = choose(config.ffn, ffn)
        kept[f"layers.{i}.self_attn"] = (choose(kv_width, kv), choose(kv_width, kv))
    return kept


def all_kept(config: DecoderConfig) -> Kept:
    """Keep every channel of every site."""
    kv_width = config.kv_heads * config.head_dim
    return random_kept(config, range(config.layers), ffn=config.ffn, kv=kv_width)


# --- Random tensors ---------------------------------------------------------------------------------------------------


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal fp64 numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_mask(*shape: int, seed: int = 0) -> Tensor:
    """A bool tensor, true at 60% of its positions."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6
