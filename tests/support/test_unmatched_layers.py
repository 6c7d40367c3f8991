"""Every frozen linear layer that runs is in a site, on the rows of the loss, or named with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

from models import batch
from sparse_compile.compiler.capture import capture_context
from sparse_compile.compiler.runner import run_pipeline
from sparse_compile.compiler.unmatched import unmatched_layers
from sparse_compile.graph.sites import Site
from sparse_compile.options.config import SparseLoRAConfig
from sweeps import sweep

ROOT = Path(__file__).resolve().parents[2]
VOCAB = 97
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "n_embed": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "n_inner": 48,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "decoder_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_attention_heads": 4,
    "attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "n_head": 4,
    "n_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "max_seq_len": 64,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_global": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "use_cache": False,
    "is_decoder": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""Options of tiny models, by the names that configurations give them."""

FAMILIES = (
    "llama", "bloom", "mixtral",
    "afmoe", "apertus", "arcee", "aria_text", "biogpt", "bitnet", "codegen", "cohere", "cohere2", "ctrl", "diffllama",
    "ernie4_5", "exaone4", "falcon", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt_bigcode", "gpt_neo",
    "gpt_oss", "gptj", "granite", "granitemoe", "granitemoeshared", "helium", "hunyuan_v1_dense", "jetmoe", "mamba",
    "ministral", "mistral", "mpt", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt", "persimmon", "phi", "phi3",
    "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "rwkv", "seed_oss", "smollm3", "stablelm", "starcoder2",
    "trocr", "xglm",
    "bailing_hybrid", "bart", "beam", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "blenderbot",
    "blenderbot-small", "camembert", "cohere2_moe", "cpmant", "cwm", "data2vec-text", "deepseek_v4", "doge", "electra",
    "ernie", "ernie4_5_moe", "exaone_moe", "falcon_h1", "falcon_mamba", "flex_olmo", "flint", "jamba", "lfm2",
    "llama4_text", "nemotron_h", "qwen3_5_text", "qwen3_next",
    "axk1", "axk2", "bamba", "blt", "cohere_compass_text", "dbrx", "deepseek_v2", "deepseek_v3", "deepseek_v32",
    "dots1", "dots3_note_text", "emu3", "fuyu", "gemma3", "gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified",
    "gemma4_unified_text", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "got_ocr2", "gpt-sw3", "gpt2", "gpt_neox",
    "gpt_neox_japanese", "granite_swa", "granitemoe_swa", "granitemoehybrid", "hrm_text", "hunyuan_v1_moe", "hy_v3",
    "hy_v4", "hyperclovax", "inkling2_text", "inkling_text", "internlm3", "iquestcoder", "jais2", "kimi_linear",
    "kolibri1", "laguna", "lfm2_moe", "lfm3", "llama4", "longcat_flash", "mamba2", "marian", "mbart", "megatron-bert",
    "mellum", "mimo_v2_flash", "minicpm3", "minimax", "minimax_m2", "minimax_m3_vl_text", "ministral3", "mllama",
    "modernbert-decoder", "moshi", "moss_transcribe_diarize", "mvp", "nanochat", "olmo_hybrid", "openai-gpt", "pegasus",
    "phi4_multimodal", "plbart", "prophetnet", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen4_exp",
    "qwen4_exp_text", "recurrent_gemma", "reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert",
    "roformer", "solar_open", "vaultgemma", "whisper", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet", "xlstm", "xmod",
    "youtu", "zamba", "zamba2", "zaya",
)  # fmt: skip
# Attention over keys that are made of a few channels: its parts have widths of their own, its heads are not grouped.
_LATENT = {
    "num_key_value_heads": 4,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
}
_STATES = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
# The families' own numbers would make both layers recurrent.
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_GROUPS = {"n_group": 2, "topk_group": 1}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
OPTIONS: dict[str, dict[str, Any]] = {
    "axk1": _LATENT | _GROUPS,
    "axk2": _LATENT,
    "bamba": _STATES | {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48},
    },
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,
    "dots1": _GROUPS | {"n_shared_experts": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _LATENT,
    "gpt_neo": {"attention_types": [[["global"], 2]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": _STATES | {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": _LATENT,
    "mamba2": {"num_heads": 8},
    "minicpm3": _LATENT,
    "qwen3_5_text": _HYBRID,
    "qwen3_5_moe_text": _HYBRID,
    "qwen3_next": _HYBRID,
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "local"]},
    "stablelm": {"partial_rotary_factor": 0.5},  # a quarter of 8 channels would be a single pair
    "xmod": {"default_language": "en_XX"},
    "youtu": _LATENT,
    "zamba": {"layer_types": ["hybrid", "hybrid"]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}
"""Options that a family needs beside `SIZES`, or in their place."""

NOT_BUILT = {
    "dots3_note": "keys must be integer layer indices",  # its text's layers are configured one by one
    "gemma3n": "requires the timm library",  # the part that sees
    "gemma4_assistant": "must be 0",  # it reads the keys of another model
    "gemma4_unified_assistant": "set of layer types producing a cache",  # it reads the keys of another model
    "git": "Expected input batch_size",  # the loss leaves out the rows of an image, which a text does not have
    "musicgen": "no attribute 'dropout'",  # its decoder is built from a configuration of another type
    "musicgen_melody": "no attribute 'dropout'",
}
"""Families that were tried and whose tiny model does not build or run with `SIZES`, each with words of the error."""


def sizes(known: Any) -> dict[str, Any]:
    """Return the options that make a configuration tiny, and those that are its parts."""
    # Where layers differ, this lets the size of most be read.
    known.allow_global_per_layer_attribute_access = True
    kind = type(known)
    options = {name: size for name, size in SIZES.items() if hasattr(known, name)}
    options = {name: size for name, size in options.items() if not isinstance(getattr(kind, name, None), property)}
    options |= OPTIONS.get(known.model_type, {})
    for name in known.sub_configs:
        part = getattr(known, name, None)
        if part is not None and name not in options:
            options[name] = type(part)(**sizes(part))
    return options


def tiny(family: str) -> nn.Module:
    """Return a frozen tiny causal language model of a family, whose embedding is trained."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(kind(**sizes(kind())))
    model.requires_grad_(False).train()
    model.loss_type = model.loss_type or "ForCausalLM"
    model.get_input_embeddings().weight.requires_grad_(True)
    return model  # type: ignore[no-any-return]


def layers_that_run(model: nn.Module, inputs: dict[str, torch.Tensor]) -> set[str]:
    """Return the frozen linear layers that a forward calls."""
    from transformers.pytorch_utils import Conv1D

    called: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: called.add(name))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and not module.weight.requires_grad
    ]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    return called


def accounts(model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[set[str], dict[str, str]]:
    """Return the layers whose weights the captured graphs read, and what is said of each that is said something of.

    Of blocks behind graph breaks the first alone is captured: this backend sets no guard that tells them apart.
    """
    owners = {id(parameter): name.rpartition(".")[0] for name, parameter in model.named_parameters()}
    captured: set[str] = set()
    said: dict[str, str] = {}

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        ctx = capture_context(gm, example_inputs, SparseLoRAConfig())
        result = run_pipeline(gm, ctx)
        assert not result.failed, [each.name for each in result.failed]
        # A graph that is a part of the model names parameters from there on.
        owner = {
            parameter.path.removesuffix(".weight"): owners[id(parameter.value)]
            for parameter in ctx.env.parameters.values()
            if id(parameter.value) in owners
        }
        captured.update(owner.values())
        facts = ctx.facts
        sites: tuple[Site, ...] = (*facts.ffn_sites, *facts.attention_sites)
        of_sites = [(each.layer.name, "a site") for site in sites for each in site.projections]
        narrowed = facts.loss_rows.nodes if facts.loss_rows is not None else ()
        on_rows = [(each.name, "rows of the loss") for each in facts.projections.values() if each.base in narrowed]
        found = (*result.rejections, *unmatched_layers(result.canonical.graph, ctx, result.rejections))
        for name, reason in (*of_sites, *on_rows, *((each.node, each.reason) for each in found)):
            said[owner.get(name, name)] = reason
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend, dynamic=False)(**inputs)
    return captured, said


@pytest.mark.parametrize("family", sweep(FAMILIES, "bloom", "mixtral"))
def test_every_layer_is_in_a_site_or_named(family: str) -> None:
    model, inputs = tiny(family), batch(VOCAB)
    running = layers_that_run(model, inputs)
    captured, said = accounts(model, inputs)
    assert running & captured, "no layer of this model is in a graph: this tests nothing"
    assert (running & captured) - said.keys() == set()


def test_what_is_said_of_bloom() -> None:
    said = accounts(tiny("bloom"), batch(VOCAB))[1]
    assert said["transformer.h.0.self_attention.query_key_value"] == "a site"
    assert "a gradient of its own" in said["transformer.h.0.mlp.dense_4h_to_h"]


def test_every_family_was_tried() -> None:
    from transformers import __version__
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert not NOT_BUILT.keys() & set(FAMILIES)
    untried = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - NOT_BUILT.keys() - set(FAMILIES))
    if untried and f"transformers=={__version__}" not in (ROOT / "requirements.lock").read_text().splitlines():
        pytest.skip(f"transformers {__version__} is not the one that is pinned, and has more: {', '.join(untried)}")
    assert untried == []


@pytest.mark.slow
@pytest.mark.parametrize("family", NOT_BUILT)
def test_families_that_are_left_out_do_not_run(family: str) -> None:
    with pytest.raises(Exception, match=NOT_BUILT[family]):
        tiny(family)(**batch(VOCAB))
