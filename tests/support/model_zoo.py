"""The models of the support matrix: tiny, one block, random weights, each built from its configuration alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from models import DecoderConfig, Fp64Decoder, Kept, batch, randomize, with_lora
from sparse_compile.reference import MaskedAttention, MaskedFFN, output_mask_from_labels

VOCAB, HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM = 97, 32, 48, 4, 2, 8
QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Attention:
    """Names of the projections within an attention module, for the oracle.

    Attributes:
        names: query, key, value, output; three times the same name where they are fused.
        groups: query heads per key/value head.
        rows: of a fused layer, the outputs of query, key and value.
        query_rows: of a query's layer that holds more than the query, the outputs that are the query's.
    """

    names: tuple[str, str, str, str] = ("q_proj", "k_proj", "v_proj", "o_proj")
    groups: int = 1
    rows: tuple[Tensor, Tensor, Tensor] | None = None
    query_rows: Tensor | None = None


@dataclass(frozen=True)
class ModelRow:
    """A model of the matrix.

    Attributes:
        title: what the page calls it.
        build: returns it with adapters, in fp64 and in training mode.
        sites: its sparse sites, by the end of their names: the name of an out-projection (feed-forward), or of the
            projections (attention).
        stays: of its frozen layers those that stay dense, by a part of their names, each with words of the reason that
            the backend's report gives (or none, where it is no layer that is looked at); empty where no layer does.
        declined: words of the one warning where all of it trains dense.
        head_dim: channels of a head.
        inputs: returns a batch.
        roles: returns the output tokens of labels.
        dtype: of the model.
    """

    title: str
    build: Callable[[], nn.Module]
    sites: Mapping[str, str | Attention]
    stays: Mapping[str, str] = field(default_factory=dict)
    declined: str = ""
    head_dim: int = HEAD_DIM
    inputs: Callable[[], dict[str, Tensor]] = field(default=lambda: batch(VOCAB, padding="right"))
    roles: Callable[[Tensor], Tensor] = output_mask_from_labels
    dtype: torch.dtype = torch.float64

    def oracle_sites(self, model: nn.Module, kept: Kept) -> list[MaskedFFN | MaskedAttention]:
        """Describe the sites with their kept channels to the oracle."""
        found: list[MaskedFFN | MaskedAttention] = []
        for name, channels in kept.items():
            (form,) = (form for suffix, form in self.sites.items() if name.endswith(suffix))
            site = model.get_submodule(name)
            if isinstance(form, str):
                assert isinstance(channels, Tensor)
                found.append(MaskedFFN(site.get_submodule(form), channels))
            else:
                q, k, v, o = (site.get_submodule(each) for each in form.names)
                rows = form.rows, form.query_rows
                found.append(MaskedAttention(q, k, v, o, *channels, self.head_dim, form.groups, *rows))
        return found


def hugging_face(
    model: str,
    config: str,
    targets: tuple[str, ...],
    attention: str = "sdpa",
    loss_type: str | None = "ForCausalLM",
    dora: bool = False,
    **options: Any,
) -> Callable[[], nn.Module]:
    """Return what builds a model of `transformers` with adapters on the layers named."""

    def build() -> nn.Module:
        import transformers

        settings = getattr(transformers, config)(**options, attn_implementation=attention)
        with torch.random.fork_rng(devices=[]):
            built = getattr(transformers, model)(settings)
        # Of a GPT-2 transformers knows no loss by its name: it logs a line at the loss, which cuts the graph there.
        built.loss_type = built.loss_type or loss_type
        randomize(built, 0)
        return with_lora(built.double().train(), targets, dora=dora)

    return build


def _decoder(model: str, config: str, *, targets: tuple[str, ...] = QKVO, **options: Any) -> Callable[[], nn.Module]:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 64,
        "use_cache": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return hugging_face(model, config, targets, **{**sizes, **options})


def _interleaved(head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    heads = torch.arange(HEADS * 3 * head_dim).view(HEADS, 3, head_dim)
    return heads[:, 0].flatten(), heads[:, 1].flatten(), heads[:, 2].flatten()


def _side_by_side(kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.arange((HEADS + 2 * kv_heads) * HEAD_DIM).split(
        [HEADS * HEAD_DIM, kv_heads * HEAD_DIM, kv_heads * HEAD_DIM]
    )
    return q, k, v


def _first_of_two(head_dim: int) -> Tensor:
    return torch.arange(HEADS * 2 * head_dim).view(HEADS, 2, head_dim)[:, 0].flatten()


def _images() -> dict[str, Tensor]:
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {"pixel_values": pixels, "labels": torch.tensor([0, 3, 1])}


GQA = Attention(groups=HEADS // KV_HEADS)
ROUTED = {"mlp.experts": "holds several experts", "mlp.gate": ""}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": HIDDEN,
    "n_inner": FFN,
    "n_layer": 1,
    "n_head": HEADS,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}

MODELS: dict[str, ModelRow] = {
    "llama": ModelRow(
        "Llama",
        _decoder("LlamaForCausalLM", "LlamaConfig", targets=(*QKVO, "gate_proj", "up_proj", "down_proj")),
        {"self_attn": GQA, "mlp": "down_proj"},
    ),
    "mistral": ModelRow(
        "Mistral",
        _decoder("MistralForCausalLM", "MistralConfig", head_dim=HEAD_DIM),
        {"self_attn": GQA, "mlp": "down_proj"},
    ),
    "qwen2": ModelRow(
        "Qwen2 (bias on q, k, v)", _decoder("Qwen2ForCausalLM", "Qwen2Config"), {"self_attn": GQA, "mlp": "down_proj"}
    ),
    "qwen3": ModelRow(
        "Qwen3 (norms of query and key heads)",
        _decoder("Qwen3ForCausalLM", "Qwen3Config", head_dim=HEAD_DIM),
        {"self_attn": GQA, "mlp": "down_proj"},
    ),
    "gemma2": ModelRow(
        "Gemma 2 (GeGLU, soft-capped scores, four norms)",
        _decoder("Gemma2ForCausalLM", "Gemma2Config", attention="eager", head_dim=HEAD_DIM),
        {"self_attn": GQA, "mlp": "down_proj"},
    ),
    "phi3": ModelRow(
        "Phi-3 (fused qkv, fused gate and up)",
        _decoder("Phi3ForCausalLM", "Phi3Config", targets=("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
        {
            "self_attn": Attention(
                ("qkv_proj", "qkv_proj", "qkv_proj", "o_proj"), HEADS // KV_HEADS, _side_by_side(KV_HEADS)
            ),
            "mlp": "down_proj",
        },
    ),
    "gpt_neox": ModelRow(
        "GPT-NeoX (qkv interleaved by head, parallel block, no gate)",
        hugging_face(
            "GPTNeoXForCausalLM",
            "GPTNeoXConfig",
            ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
            vocab_size=VOCAB,
            # A quarter of a head's channels is rotated, which of 8 would be a single pair.
            hidden_size=2 * HIDDEN,
            intermediate_size=FFN,
            num_hidden_layers=1,
            num_attention_heads=HEADS,
            use_cache=False,
        ),
        {
            "attention": Attention((*("query_key_value",) * 3, "dense"), 1, _interleaved(2 * HEAD_DIM)),
            "mlp": "dense_4h_to_h",
        },
        head_dim=2 * HEAD_DIM,
    ),
    "gpt2": ModelRow(
        'GPT-2 (`Conv1D`, fused qkv) with `model.loss_type = "ForCausalLM"`',
        hugging_face("GPT2LMHeadModel", "GPT2Config", ("c_attn", "c_proj", "c_fc"), **GPT2),
        {"attn": Attention((*("c_attn",) * 3, "c_proj"), 1, _side_by_side(HEADS)), "mlp": "c_proj"},
    ),
    "opt": ModelRow(
        "OPT (bias, ReLU, no gate)",
        hugging_face(
            "OPTForCausalLM",
            "OPTConfig",
            ("q_proj", "k_proj", "v_proj", "out_proj"),
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            ffn_dim=FFN,
            num_hidden_layers=1,
            num_attention_heads=HEADS,
            max_position_embeddings=64,
            word_embed_proj_dim=HIDDEN,
            dropout=0.0,
            use_cache=False,
        ),
        {"self_attn": Attention(("q_proj", "k_proj", "v_proj", "out_proj")), "layers.0": "fc2"},
    ),
    "llama4": ModelRow(
        "Llama 4 (rotary embedding by complex numbers), dense layers",
        _decoder(
            "Llama4ForCausalLM",
            "Llama4TextConfig",
            head_dim=HEAD_DIM,
            intermediate_size_mlp=FFN,
            moe_layers=[],
            num_local_experts=2,
        ),
        {"self_attn": GQA, "feed_forward": "down_proj"},
        dtype=torch.float32,  # complex numbers of the rotary table are single
    ),
    "gpt_oss": ModelRow(
        "gpt-oss (attention sinks)",
        _decoder("GptOssForCausalLM", "GptOssConfig", attention="eager", head_dim=HEAD_DIM, num_local_experts=4),
        {"self_attn": GQA},
        stays={"mlp.experts": "holds several experts", "mlp.router": ""},
        dtype=torch.float32,
    ),
    "qwen3_5": ModelRow(
        "Qwen3.5 (gated result of attention; the gate is a part of the query's layer)",
        _decoder(
            "Qwen3_5ForCausalLM",
            "Qwen3_5TextConfig",
            head_dim=HEAD_DIM,
            layer_types=["full_attention"],
        ),
        {
            "self_attn": Attention(groups=HEADS // KV_HEADS, query_rows=_first_of_two(HEAD_DIM)),
            "mlp": "down_proj",
        },
    ),
    "falcon": ModelRow(
        "Falcon (one key/value head, fused qkv picked by lists)",
        hugging_face(
            "FalconForCausalLM",
            "FalconConfig",
            ("query_key_value", "dense", "dense_h_to_4h"),
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            num_hidden_layers=1,
            num_attention_heads=HEADS,
            use_cache=False,
            bos_token_id=1,
            eos_token_id=2,
        ),
        {
            "self_attention": Attention((*("query_key_value",) * 3, "dense"), HEADS, _side_by_side(1)),
            "mlp": "dense_4h_to_h",
        },
    ),
    "bloom": ModelRow(
        "BLOOM (ALiBi, heads of all sequences in one dimension)",
        hugging_face(
            "BloomForCausalLM",
            "BloomConfig",
            ("query_key_value", "dense"),
            attention="eager",
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            n_layer=1,
            n_head=HEADS,
            use_cache=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        {"self_attention": Attention((*("query_key_value",) * 3, "dense"), 1, _interleaved(HEAD_DIM))},
        stays={"mlp": "a gradient of its own"},
    ),
    "bitnet": ModelRow(
        "BitNet (a norm before the output projection)",
        _decoder("BitNetForCausalLM", "BitNetConfig"),
        {"self_attn": GQA},
        stays={"mlp": "a norm over its channels"},
    ),
    "apertus": ModelRow(
        "Apertus (xIELU: an activation with learned numbers)",
        _decoder("ApertusForCausalLM", "ApertusConfig"),
        {"self_attn": GQA, "mlp": "down_proj"},
    ),
    "xglm": ModelRow(
        "XGLM (attention written out over batch and heads as one dimension)",
        hugging_face(
            "XGLMForCausalLM",
            "XGLMConfig",
            ("q_proj", "k_proj", "v_proj", "out_proj"),
            vocab_size=VOCAB,
            d_model=HIDDEN,
            ffn_dim=FFN,
            num_layers=1,
            attention_heads=HEADS,
            max_position_embeddings=64,
            dropout=0.0,
            attention_dropout=0.0,
            use_cache=False,
            attention="eager",
        ),
        {"self_attn": Attention(("q_proj", "k_proj", "v_proj", "out_proj")), "layers.0": "fc2"},
        dtype=torch.float32,  # its mask takes the smallest number of the dtype as a float
    ),
    "mixtral": ModelRow(
        "Mixtral",
        _decoder("MixtralForCausalLM", "MixtralConfig", num_local_experts=4),
        {"self_attn": GQA},
        stays=ROUTED,
        dtype=torch.float32,  # grouped products of experts have no fp64 kernel
    ),
    "qwen2_moe": ModelRow(
        "Qwen2-MoE (shared expert)",
        _decoder(
            "Qwen2MoeForCausalLM",
            "Qwen2MoeConfig",
            num_experts=4,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=FFN,
        ),
        {"self_attn": GQA, "mlp.shared_expert": "down_proj"},
        stays={**ROUTED, "mlp.shared_expert_gate": ""},
        dtype=torch.float32,
    ),
    "t5": ModelRow(
        "T5 (a decoder position is output where it predicts a label that counts)",
        hugging_face(
            "T5ForConditionalGeneration",
            "T5Config",
            ("q", "k", "v", "o"),
            vocab_size=VOCAB,
            d_model=HIDDEN,
            d_kv=HEAD_DIM,
            d_ff=FFN,
            num_layers=1,
            num_decoder_layers=1,
            num_heads=HEADS,
            dropout_rate=0.0,
            use_cache=False,
            decoder_start_token_id=0,
            pad_token_id=0,
        ),
        {
            "decoder.block.0.layer.0.SelfAttention": Attention(("q", "k", "v", "o")),
            "decoder.block.0.layer.2.DenseReluDense": "wo",
        },
        stays={
            "encoder": "",
            "EncDecAttention": "cross-attention stays dense",
        },
        inputs=lambda: {**batch(VOCAB, length=12), "input_ids": batch(VOCAB, length=17, seed=1)["input_ids"]},
        # The decoder reads labels shifted to the right: position t predicts the label of its own place.
        roles=lambda labels: labels != -100,
    ),
    "hand_written": ModelRow(
        "hand-written `nn.Module`, hand-written adapters",
        lambda: Fp64Decoder(DecoderConfig(layers=1)).train(),
        {"self_attn": GQA, "mlp": "down_proj"},
        inputs=lambda: batch(61, padding="right"),
    ),
}
"""Every model that trains sparsely."""

VISION = hugging_face(
    "ViTForImageClassification",
    "ViTConfig",
    ("q_proj", "v_proj"),
    hidden_size=HIDDEN,
    intermediate_size=FFN,
    num_hidden_layers=1,
    num_attention_heads=HEADS,
    image_size=16,
    patch_size=4,
    num_labels=5,
)

DECLINED: dict[str, ModelRow] = {
    "vit": ModelRow("ViT classifier", VISION, {}, declined="integer tensor (batch, tokens)", inputs=_images),
    "gpt2_as_it_comes": ModelRow(
        "GPT-2 as it comes: transformers logs a line at its loss, which cuts the graph there",
        hugging_face("GPT2LMHeadModel", "GPT2Config", ("c_attn",), loss_type=None, **GPT2),
        {},
        declined="neither a cross-entropy nor labels compared with ignore_index are in the graph",
    ),
    "phi3_dora": ModelRow(
        "Phi-3 with DoRA on its fused layers",
        _decoder("Phi3ForCausalLM", "Phi3Config", targets=("qkv_proj", "gate_up_proj"), dora=True),
        {},
        declined="with a DoRA adapter",
    ),
}
"""Models that train dense, each with words of the one warning that says so."""
