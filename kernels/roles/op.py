"""Semantic ops that tell output tokens from context tokens (docs/semantics.md, "Roles: output and context")."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.kernels.roles import reference
from sparse_compile.kernels.roles.given import current_roles


@torch.library.custom_op("sparselora::output_mask", mutates_args=())
def output_mask(labels: Tensor, ignore_index: int, shift: int) -> Tensor:
    """Mark the output tokens of `labels` (B, S) as bool (B, S); see `reference.output_mask`."""
    return reference.output_mask(labels, ignore_index, shift)


@output_mask.register_fake
def _(labels: Tensor, ignore_index: int, shift: int) -> Tensor:
    return labels.new_empty(labels.shape, dtype=torch.bool)


# A CUDA graph would replay the roles that were given when it was captured.
@torch.library.custom_op("sparselora::given_output_mask", mutates_args=(), tags=torch.Tag.cudagraph_unsafe)
def given_output_mask(tokens: Tensor) -> Tensor:
    """Return the roles that `token_roles(...)` holds at this forward, as bool (B, S) on the device of `tokens`.

    Args:
        tokens: (B, S, ...); gives the shape to check and the device.

    Raises:
        ValueError: if the roles given are of another shape.
        RuntimeError: if no roles are given, as when a checkpoint is recomputed in the backward pass after the block
            has closed (the compiled graph is guarded on roles being given, so this is never met in a forward).
    """
    roles = current_roles()
    if roles is None:
        raise RuntimeError(
            "the token roles were given by `token_roles(...)`, which has closed: keep it open until backward() is done "
            "when activations are recomputed outside the compiled graph"
        )
    if roles.shape != tokens.shape[:2]:
        raise ValueError(f"token_roles: roles of shape {tuple(roles.shape)} for tokens of {tuple(tokens.shape[:2])}")
    # Without waiting: memory that is not pinned has been read by the time that the call returns.
    return roles.to(tokens.device, copy=True, non_blocking=True)


@given_output_mask.register_fake
def _(tokens: Tensor) -> Tensor:
    return tokens.new_empty(tokens.shape[:2], dtype=torch.bool)


@torch.library.custom_op("sparselora::shuffled_mask", mutates_args=())
def shuffled_mask(mask: Tensor, eligible: Tensor) -> Tensor:
    """Mark as many random tokens as `mask` does, for the ablation of the paper's Table 8; see `reference`."""
    return reference.shuffled_mask(mask, eligible)


@shuffled_mask.register_fake
def _(mask: Tensor, eligible: Tensor) -> Tensor:
    return torch.empty_like(mask)
