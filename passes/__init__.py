"""The passes, one file each; `README.md` states their invariants, `sparse_compile/compiler/pipeline.py` their order."""

PASS_NAMES: tuple[str, ...] = (
    "inline_checkpoint_bodies",
    "expose_4bit_weights",
    "canonicalize_linears",
    "find_projections",
    "find_ffn",
    "find_attention",
    "trace_roles",
    "plan_token_slots",
    "plan_sparsity",
    "select_loss_rows",
    "preserve_weight_mask",
    "order_adapter_products",
    "fuse_adapters",
    "factor_dora_norm",
    "insert_predictors",
    "sparsify_ffn",
    "sparsify_attention",
    "fuse_products",
    "fuse_scores",
    "fuse_adapted_layers",
    "lower_sparse_ops",
    "lower_frozen_linears",
    "lower_causal_attention",
)
"""The names that `disable=` takes, in the order of `pipeline.passes()`; a test holds the two together."""

__all__ = ["PASS_NAMES"]
