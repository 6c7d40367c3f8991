"""What is told once."""

from __future__ import annotations

from sparse_compile.training.told import IN_PROCESS, Told


def test_a_key_is_told_once() -> None:
    told = Told()
    assert "key" not in told
    assert [told.once("key") for _ in range(3)] == [True, False, False]
    assert "key" in told
    assert Told().once("key")


def test_what_is_taken_for_given_is_not_told() -> None:
    told, other = Told(), Told()
    other.once("other")
    told.add(["one", "two"])
    told.absorb(other)
    assert not any(told.once(key) for key in ("one", "two", "other"))
    assert other.once("one")


def test_all_can_be_forgotten() -> None:
    assert IN_PROCESS.once("key") and not IN_PROCESS.once("key")
    IN_PROCESS.clear()
    assert IN_PROCESS.once("key")
