"""Hold the semantics of contextual sparsity as plain PyTorch.

Every fast path of the project is tested against this package. It works on the unmodified eager model through hooks, and
shares no code with the passes: a fault in a pass cannot hide in its oracle.

Source: SparseLoRA (arXiv 2506.16500): its sparsity criteria, its SVD estimator, its split of context and output tokens.
Where the published code departs from the formulas (gradients of sparse attention, grouped-query heads, adapters inside
the FFN), the formulas hold here.
"""

from sparse_compile.reference.context_exit import ContextExit, ExitMap
from sparse_compile.reference.criteria import (
    PredictorTokens,
    Projection,
    expand_kv_channels,
    ffn_scores,
    kept_count,
    low_rank_factors,
    mean_over_context,
    output_mask_from_labels,
    predictor_rows,
    query_key_scores,
    scored_positions,
    top_channels,
    value_scores,
)
from sparse_compile.reference.masked_dense import MappedFFN, MaskedAttention, MaskedFFN, masked_dense

__all__ = [
    "ContextExit",
    "ExitMap",
    "MappedFFN",
    "MaskedAttention",
    "MaskedFFN",
    "PredictorTokens",
    "Projection",
    "expand_kv_channels",
    "ffn_scores",
    "kept_count",
    "low_rank_factors",
    "masked_dense",
    "mean_over_context",
    "output_mask_from_labels",
    "predictor_rows",
    "query_key_scores",
    "scored_positions",
    "top_channels",
    "value_scores",
]
