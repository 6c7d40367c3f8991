"""Every frozen linear layer that runs is in a site, on the rows of the loss, or named with a reason."""

from __future__ import annotations

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
)  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global"], 2]]},
}
NOT_BUILT = {
    "axk1": "must match the size of tensor",  # heads of several widths
    "axk2": "must match the size of tensor",
    "bamba": "must divide mamba_expand",  # heads of the state space
    "dots1": "unsupported operand type",  # groups of experts
}
"""Families that were tried and whose tiny model does not build or run with `SIZES`, each with words of the error."""


def tiny(family: str) -> nn.Module:
    """Return a frozen tiny causal language model of a family, whose embedding is trained."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family]
    known = kind()
    options = {name: size for name, size in SIZES.items() if hasattr(known, name)}
    options = {name: size for name, size in options.items() if not isinstance(getattr(kind, name, None), property)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(kind(**{**options, **OPTIONS.get(family, {})}))
    model.requires_grad_(False).train()
    model.loss_type = model.loss_type or "ForCausalLM"
    model.get_input_embeddings().weight.requires_grad_(True)
    return model  # type: ignore[no-any-return]


def layers_that_run(model: nn.Module, inputs: dict[str, torch.Tensor]) -> set[str]:
    """Return the frozen linear layers that a forward calls."""
    called: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: called.add(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not module.weight.requires_grad
    ]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    return called


def accounts(model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[set[str], dict[str, str]]:
    """Return the layers whose weights the captured graphs read, and what is said of each that is said something of."""
    owners = {id(parameter): name.rpartition(".")[0] for name, parameter in model.named_parameters()}
    captured: set[str] = set()
    said: dict[str, str] = {}

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        ctx = capture_context(gm, example_inputs, SparseLoRAConfig())
        result = run_pipeline(gm, ctx)
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
    assert said["transformer.h.0.self_attention.query_key_value"].endswith("its scores are made by baddbmm")
    assert "a gradient of its own" in said["transformer.h.0.mlp.dense_4h_to_h"]


@pytest.mark.slow
@pytest.mark.parametrize("family", NOT_BUILT)
def test_families_that_are_left_out_do_not_run(family: str) -> None:
    with pytest.raises(Exception, match=NOT_BUILT[family]):
        tiny(family)(**batch(VOCAB))
