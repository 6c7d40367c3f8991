"""The models and batches that other tests build on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models import BATCHES, DecoderConfig, Fp64Decoder, batch


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("attention", ["sdpa", "sdpa_gqa", "eager"])
def test_decoder_masks_padding_and_packing(attention: str) -> None:
    config = DecoderConfig(attention=attention)
    model = Fp64Decoder(config)
    ids = torch.randint(1, config.vocab, (1, 7), generator=torch.Generator().manual_seed(0))
    _, alone = model(ids)
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.long), ids), dim=1)
    _, left = model(padded, attention_mask=(padded != 0).long())
    close(left[:, 3:], alone)  # rotary embeddings are relative
    assert left.isfinite().all()
    position_ids = torch.cat((torch.arange(7), torch.arange(7)))[None]
    _, packed = model(torch.cat((ids, ids), dim=1), position_ids=position_ids)
    close(packed[:, :7], alone)
    close(packed[:, 7:], alone)


@pytest.mark.parametrize("shape", list(BATCHES))
def test_batches_have_ragged_prompts(shape: str) -> None:
    inputs = batch(61, 4, 24, **BATCHES[shape])
    counted = inputs["labels"] != -100
    assert len({tuple(row.tolist()) for row in counted}) == 4
    assert torch.equal(inputs["labels"][counted], inputs["input_ids"][counted])
    if "attention_mask" in inputs:
        padding = inputs["attention_mask"] == 0
        assert not padding[0].any()
        assert padding[1:].any(dim=1).all()
        assert not counted[padding].any()
    if "position_ids" in inputs:
        assert ((inputs["position_ids"] == 0).sum(dim=1) >= 2).all()
