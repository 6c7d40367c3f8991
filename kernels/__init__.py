"""The semantic ops of the `sparselora` library; importing this package registers them with PyTorch."""

from sparse_compile.kernels import (
    channel_selection,
    dora_norm,
    gathered_linear,
    loss_rows,
    masked_linear,
    merged_linear,
    roles,
    token_rows,
)

__all__ = [
    "channel_selection",
    "dora_norm",
    "gathered_linear",
    "loss_rows",
    "masked_linear",
    "merged_linear",
    "roles",
    "token_rows",
]
