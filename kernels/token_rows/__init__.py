"""Token split and merge: `split_tokens`, `token_slots`, `take_rows`, `put_rows`; channels of grouped-query heads."""

from sparse_compile.kernels.token_rows.op import (
    PUT_ROWS,
    TAKE_ROWS,
    expand_kv_channels,
    put_rows,
    row_counts,
    split_tokens,
    take_rows,
    token_slots,
)

__all__ = [
    "PUT_ROWS",
    "TAKE_ROWS",
    "expand_kv_channels",
    "put_rows",
    "row_counts",
    "split_tokens",
    "take_rows",
    "token_slots",
]
