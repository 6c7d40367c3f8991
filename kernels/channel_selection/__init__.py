"""Channel prediction and selection: low-rank scores, top-k, and means to observe the choice."""

from sparse_compile.kernels.channel_selection.op import (
    PREDICTED_NORMS,
    PREDICTED_SCORES,
    TOP_CHANNELS,
    context_mean,
    degenerate_counts,
    low_rank_product,
    predicted_norms,
    predicted_scores,
    prepare_count,
    record_channels,
    spaced_rows,
    top_channels,
)

__all__ = [
    "PREDICTED_NORMS",
    "PREDICTED_SCORES",
    "TOP_CHANNELS",
    "context_mean",
    "degenerate_counts",
    "low_rank_product",
    "predicted_norms",
    "predicted_scores",
    "prepare_count",
    "record_channels",
    "spaced_rows",
    "top_channels",
]
