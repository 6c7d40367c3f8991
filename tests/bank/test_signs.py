"""Signs that are projected on must never change: sketches are kept."""

from __future__ import annotations

import torch

from sparse_compile.bank.signs import signs


def test_they_are_those_of_the_hash() -> None:
    # The lowest bit first of the first bytes of SHAKE-256 of "a 2 4".
    import hashlib

    (byte,) = hashlib.shake_256(b"a 2 4").digest(1)
    expected = [1.0 if byte >> bit & 1 else -1.0 for bit in range(8)]
    assert signs("a", 2, 4).flatten().tolist() == expected


def test_names_and_sizes_tell_them_apart_and_they_are_even() -> None:
    one, other = signs("a", 64, 64), signs("b", 64, 64)
    assert set(one.unique().tolist()) == {-1.0, 1.0}
    assert abs(one.mean().item()) < 0.06 and abs((one * other).mean().item()) < 0.06
    assert torch.equal(one, signs("a", 64, 64))
    assert signs("a", 3, 5).shape == (3, 5)
