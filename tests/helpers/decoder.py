"""A causal decoder of plain torch that computes in its parameters' dtype from end to end, fp64 included.

Hugging Face's norms compute in fp32 whatever the dtype; here agreement can be asked for to 1e-9.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN_TARGETS = ("gate_proj", "up_proj", "down_proj")
ALL_TARGETS = ATTENTION_TARGETS + FFN_TARGETS


def silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


@dataclass(frozen=True)
class DecoderConfig:
    """What an `Fp64Decoder` is made of."""

    layers: int = 3
    hidden: int = 32
    ffn: int = 48
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    vocab: int = 61
    gated: bool = True
    region: Callable[..., Tensor] = silu_gate  # takes (gate, up) when gated, else one tensor
    attention: str = "sdpa"  # "sdpa" repeats the kv heads, "sdpa_gqa" passes enable_gqa, "eager" writes out the softmax
    bias: bool = False
    tied: bool = False
    adapters: tuple[str, ...] = ALL_TARGETS
    rank: int = 4
    scale: float = 2.0
    dtype: torch.dtype = torch.float64
    seed: int = 0


class LoRALinear(nn.Module):
    """A frozen linear with a trained low-rank branch: x W' + b + s (x A') B'."""

    def __init__(self, base: nn.Linear, rank: int, scale: float):
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, rank))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scale


class RMSNorm(nn.Module):
    """Root mean square norm in the dtype of its input, fp64 included."""

    def __init__(self, hidden: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class MLP(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.region = config.region
        self.gate_proj = _linear(config, "gate_proj", config.hidden, config.ffn) if config.gated else None
        self.up_proj = _linear(config, "up_proj", config.hidden, config.ffn)
        self.down_proj = _linear(config, "down_proj", config.ffn, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.region(self.up_proj(x)))
        return self.down_proj(self.region(self.gate_proj(x), self.up_proj(x)))


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.kind = config.attention
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.heads // config.kv_heads
        q_width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = _linear(config, "q_proj", config.hidden, q_width)
        self.k_proj = _linear(config, "k_proj", config.hidden, kv_width)
        self.v_proj = _linear(config, "v_proj", config.hidden, kv_width)
        self.o_proj = _linear(config, "o_proj", q_width, config.hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        heads_shape = (*x.shape[:-1], -1, self.head_dim)
        q = rotate(self.q_proj(x).view(heads_shape).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(x).view(heads_shape).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(heads_shape).transpose(1, 2)
        enable_gqa = self.kind == "sdpa_gqa"
        if not enable_gqa:
            k, v = repeat_kv(k, self.num_key_value_groups), repeat_kv(v, self.num_key_value_groups)
        if self.kind == "eager":
            assert mask is not None
            scores = q @ k.transpose(2, 3) * self.head_dim**-0.5
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
            out = scores.softmax(dim=-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=enable_gqa)
        return self.o_proj(out.transpose(1, 2).reshape(*x.shape[:-1], -1))


class DecoderLayer(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Fp64Decoder(nn.Module):
    """A causal decoder of plain torch that computes in its parameters' dtype from end to end.

    The loss slices off the last position (`logits[:, :-1]`), where Hugging Face pads the labels: both spellings occur.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        if config.region is silu_gate and not config.gated:
            raise ValueError("an ungated MLP needs a region of one argument")
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList([DecoderLayer(config) for _ in range(config.layers)])
        self.norm = RMSNorm(config.hidden)
        self.lm_head = nn.Linear(config.hidden, config.vocab, bias=False)
        if config.tied:
            self.lm_head.weight = self.embed_tokens.weight
        self.to(config.dtype).requires_grad_(False)
        randomize(self, config.seed)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("lora_" in name)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        x = self.embed_tokens(input_ids)
        mask = self._mask(input_ids, attention_mask, position_ids)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        cos, sin = rope(position_ids, self.config.head_dim, x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        logits = self.lm_head(self.norm(x))
        if labels is None:
            return None, logits
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1))
        return loss, logits

    def _mask(self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor | None:
        """Bool (B or 1, 1, S, S), true where a query may look; None for plain causal SDPA."""
        length, device = input_ids.shape[1], input_ids.device
        if attention_mask is None and position_ids is None and self.config.attention != "eager":
            return None
        position = torch.arange(length, device=device)
        mask = (position[None, :] <= position[:, None])[None, None]
        if attention_mask is not None:
            # A padded query on the left sees nothing else: itself keeps its softmax finite.
            itself = position[None, :] == position[:, None]
            mask = mask & ((attention_mask != 0)[:, None, None, :] | itself)
        elif position_ids is not None:
            segment = (position_ids == 0).cumsum(-1)
            mask = mask & (segment[:, None, :, None] == segment[:, None, None, :])
        return mask


def fp64_decoder(**arguments: object) -> Fp64Decoder:
    """An `Fp64Decoder` from the fields of `DecoderConfig`."""
    return Fp64Decoder(DecoderConfig(**arguments))  # type: ignore[arg-type]


def rope(position_ids: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    exponent = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=dtype) / head_dim
    angles = position_ids[..., None].to(dtype) * (10000.0**-exponent)
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


def repeat_kv(x: Tensor, groups: int) -> Tensor:
    if groups == 1:
        return x
    rows, kv_heads, length, head_dim = x.shape
    x = x[:, :, None].expand(rows, kv_heads, groups, length, head_dim)
    return x.reshape(rows, kv_heads * groups, length, head_dim)


def _linear(config: DecoderConfig, name: str, inputs: int, outputs: int) -> nn.Module:
    base = nn.Linear(inputs, outputs, bias=config.bias)
    return LoRALinear(base, config.rank, config.scale) if name in config.adapters else base


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> None:
    """Fill every parameter with seeded normals: norms about 1, biases not zero, matrices that keep their scale."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            fill_normal(parameter, 0.1, generator)
        elif parameter.dim() == 1:
            fill_normal(parameter, 0.1, generator)
            parameter.add_(1)
        elif "embed" in name:
            fill_normal(parameter, 0.5, generator)
        elif "lora_B" in name:
            fill_normal(parameter, 0.1, generator)
        else:
            fill_normal(parameter, parameter.shape[1] ** -0.5, generator)


@torch.no_grad()
def fill_normal(parameter: Tensor, std: float, generator: torch.Generator) -> None:
    # Drawn in fp64 and cast: one seed gives the same model in every dtype.
    parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std)


def variants(base: DecoderConfig | None = None) -> dict[str, DecoderConfig]:
    """Name the decoders that every property must hold for: head sharing, gating, attention, bias, adapters."""
    base = base or DecoderConfig()
    return {
        "gqa": base,
        "mha": replace(base, kv_heads=base.heads),
        "enable_gqa": replace(base, attention="sdpa_gqa"),
        "eager": replace(base, attention="eager", bias=True),
        "ungated": replace(base, gated=False, region=F.gelu, bias=True),
        "relu_squared": replace(base, gated=False, region=relu_squared),
        "tied_attention_only": replace(base, tied=True, adapters=ATTENTION_TARGETS),
        "wide_heads": replace(base, heads=6, kv_heads=2, head_dim=4),
    }
