"""The guard of vectors of fixed size: what has no slot is an error, never left out in silence."""

from __future__ import annotations

from torch import Tensor

from sparse_compile.torch_private.aten import assert_on_device


def check_slots(marked: Tensor, slots: int, what: str, option: str) -> None:
    """Raise where more elements are marked than there are slots for them.

    On a CPU the count is read; elsewhere the device itself compares, so that nothing waits for it and a CUDA graph may
    hold the check. A device assert names no count, and ends the use of the device, as every one does.

    Args:
        marked: bool.
        slots: how many there are.
        what: what is marked, in the plural.
        option: the option that chose the number of slots.

    Raises:
        RuntimeError: there are more.
    """
    if marked.device.type != "cpu":
        check_on_device(marked, slots, what, option)
    elif (count := int(marked.sum())) > slots:
        raise RuntimeError(f"sparselora: {_message(count, slots, what, option)}. {_REMEDY[option]}")


def check_on_device(marked: Tensor, slots: int, what: str, option: str) -> None:
    """Have the device itself compare, as `check_slots` says."""
    assert_on_device(marked.sum() <= slots, f"sparselora: {_message('more', slots, what, option)}")


def _message(count: int | str, slots: int, what: str, option: str) -> str:
    return f"{option}: this batch has {count} {what}, and the graph has slots for {slots}"


_REMEDY = {
    "token_capacity": "Raise the option, or use token_bucket, which counts the tokens of each batch",
    "token_bucket": (
        "They were counted in other labels than those that the model was called with, or with another ignore_index: "
        "open token_roles(labels=...) with the labels of this very batch"
    ),
}
