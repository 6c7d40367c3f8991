"""The specification of token roles, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def output_mask(labels: Tensor, ignore_index: int, shift: int) -> Tensor:
    """Mark the output tokens: those whose own label, or the target they predict, is not `ignore_index`.

    Args:
        labels: (B, S) integers.
        ignore_index: the label that the loss ignores.
        shift: 1 where position t predicts `labels[:, t + 1]` (a causal loss on unshifted labels); 0 where it predicts
            `labels[:, t]` (labels shifted beforehand: position t's own label is then `labels[:, t - 1]`).

    Returns:
        (B, S) bool.
    """
    labelled = labels != ignore_index
    neighbour = torch.zeros_like(labelled)
    if shift:
        neighbour[:, :-1] = labelled[:, 1:]
    else:
        neighbour[:, 1:] = labelled[:, :-1]
    return labelled | neighbour


def shuffled_mask(mask: Tensor, eligible: Tensor) -> Tensor:
    """Mark as many tokens of each row as `mask` does, chosen at random among the eligible ones (an ablation).

    Args:
        mask: (B, S) bool.
        eligible: (B, S) bool; a row with fewer eligible tokens than marked ones marks the rest anywhere.
    """
    order = (torch.rand(mask.shape, device=mask.device) + eligible.logical_not()).argsort(1)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(mask.shape[1], device=mask.device).expand_as(order))
    return rank < mask.sum(1, keepdim=True)
