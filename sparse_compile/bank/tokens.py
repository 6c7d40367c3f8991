"""A data set as an empirical distribution over token ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sparse_compile.bank.errors import BankError

__all__ = ["Data", "count_tokens"]

Data: TypeAlias = "Iterable[Sequence[int] | Tensor | Mapping[str, Any]]"
"""Sequences of token ids, tensors of them, or batches with `input_ids` and, where they are padded, `attention_mask`."""


def count_tokens(data: Data, vocabulary: int) -> Tensor:
    """Count how often each token stands in the data.

    Args:
        data: read once, one piece after the other; a data set need not fit into memory.
        vocabulary: of the base model.

    Returns:
        (vocabulary,) of int64.

    Raises:
        BankError: no token at all, or one that the vocabulary does not have.
    """
    counts = torch.zeros(vocabulary, dtype=torch.int64)
    for number, piece in enumerate(data):
        ids = _ids(piece, number)
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            outside = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
            raise BankError(
                f"token {outside} of sequence {number} is not in the base's vocabulary of {vocabulary}; "
                "make the ids with the tokenizer of the base"
            )
        counts += torch.bincount(ids, minlength=vocabulary)
    if not counts.any():
        raise BankError("the data have no token; give sequences of token ids")
    return counts


def _ids(piece: Sequence[int] | Tensor | Mapping[str, Any], number: int) -> Tensor:
    """Return the token ids of one piece, flat, without padding."""
    try:
        batch = piece if isinstance(piece, Mapping) else {"input_ids": piece}
        given, mask = batch["input_ids"], batch.get("attention_mask")
        ids = torch.as_tensor(given).detach().cpu()
        if mask is not None:
            ids = ids[torch.as_tensor(mask).cpu().bool()]
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise BankError(f"sequence {number} of the data is no sequence of token ids ({error!r})") from None
    if ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
        raise BankError(f"sequence {number} of the data holds {ids.dtype}, not token ids")
    return ids.reshape(-1).long()
