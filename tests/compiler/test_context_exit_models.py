"""Context leaves the stream of Hugging Face decoders: as the oracle says, or not, with the reason in the report."""

from __future__ import annotations

from typing import Any

import pytest

from exited import ExitRun
from model_zoo import FFN, GPT2, HEADS, HIDDEN, KV_HEADS, QKVO, VOCAB, hugging_face
from sparse_compile.training.schedule import DENSE, SPARSE
from sweeps import sweep
from tolerances import Tolerance

pytestmark = pytest.mark.usefixtures("eager_inductor")

HF_FP64 = Tolerance(max=1e-5, rms=1e-5, why="Hugging Face's norms compute in fp32 whatever the dtype.")
ALL = (*QKVO, "gate_proj", "up_proj", "down_proj")
LAYERS = 3
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 64,
    "use_cache": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
NEOX = {**{name: LLAMA[name] for name in ("vocab_size", "intermediate_size", "num_hidden_layers", "use_cache")}}
NEOX |= {"hidden_size": 2 * HIDDEN, "num_attention_heads": HEADS}
GPTJ = {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_inner": FFN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64}
GPTJ |= {"rotary_dim": 4, "use_cache": False, "bos_token_id": 1, "eos_token_id": 2}

FAMILIES: dict[str, Any] = {
    "llama": hugging_face("LlamaForCausalLM", "LlamaConfig", ALL, **LLAMA),
    "llama, eager": hugging_face("LlamaForCausalLM", "LlamaConfig", ALL, "eager", **LLAMA),
    "mistral, a window": hugging_face("MistralForCausalLM", "MistralConfig", ALL, sliding_window=6, **LLAMA),
    "qwen2": hugging_face("Qwen2ForCausalLM", "Qwen2Config", ALL, **LLAMA),
    "qwen3": hugging_face("Qwen3ForCausalLM", "Qwen3Config", ALL, head_dim=8, **LLAMA),
    "gemma2": hugging_face("Gemma2ForCausalLM", "Gemma2Config", ALL, "eager", head_dim=8, **LLAMA),
    "olmo2": hugging_face("Olmo2ForCausalLM", "Olmo2Config", ALL, **LLAMA),
    "phi": hugging_face("PhiForCausalLM", "PhiConfig", ("q_proj", "v_proj", "dense", "fc1", "fc2"), **LLAMA),
    "phi3": hugging_face("Phi3ForCausalLM", "Phi3Config", ("qkv_proj", "o_proj", "gate_up_proj"), **LLAMA),
    "gpt_neox": hugging_face(
        "GPTNeoXForCausalLM", "GPTNeoXConfig", ("query_key_value", "dense", "dense_4h_to_h"), **NEOX
    ),
    "gpt_neox, one after the other": hugging_face(
        "GPTNeoXForCausalLM", "GPTNeoXConfig", ("query_key_value", "dense"), use_parallel_residual=False, **NEOX
    ),
    "gptj": hugging_face("GPTJForCausalLM", "GPTJConfig", ("q_proj", "v_proj", "fc_in"), "eager", **GPTJ),
    "gpt2": hugging_face("GPT2LMHeadModel", "GPT2Config", ("c_attn", "c_proj", "c_fc"), **{**GPT2, "n_layer": LAYERS}),
    "gpt2, dropout": hugging_face(
        "GPT2LMHeadModel",
        "GPT2Config",
        ("c_attn", "c_proj", "c_fc"),
        **{**GPT2, "n_layer": LAYERS, "resid_pdrop": 0.2, "embd_pdrop": 0.2},
    ),
}


@pytest.mark.parametrize("family", sweep(FAMILIES, "llama"))
def test_a_sparse_step_is_that_of_the_oracle(family: str, eager_inductor: Any) -> None:
    run = ExitRun(FAMILIES[family](), exit_=1, batches={"padding": "right"})
    assert run.train(5) == [DENSE] * 4 + [SPARSE], run.reasons
    assert len(eager_inductor.graphs) == 1
    run.check(tolerance=HF_FP64, seed=7)
