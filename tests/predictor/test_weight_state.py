"""Changes of frozen weights are noticed, whichever way they are made, and nothing else is."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

from sparse_compile.predictor.weight_state import WeightWatch, fingerprint, sample_of


def replace_data(weight: nn.Parameter) -> None:
    weight.data = weight.data.clone()


def write(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight[0, 0] = 3.0


WRITES: dict[str, Callable[[nn.Parameter], object]] = {
    "one element in place": write,
    "p.data = ...": replace_data,
    "through p.data": lambda weight: weight.data.add_(1.0),
    "NaN through p.data": lambda weight: weight.data.fill_(torch.nan),
    "another dtype": lambda weight: weight.data.copy_(weight.data.bfloat16()),
}


def weights(*names: str) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.randn(24, 40), requires_grad=False) for name in names}


@pytest.mark.parametrize("how", WRITES)
def test_each_change_is_told_once(how: str) -> None:
    model = weights("a", "b", "c")
    watch = WeightWatch({name: [weight] for name, weight in model.items()})
    assert watch.changed() == frozenset()
    WRITES[how](model["b"])
    assert watch.changed() == {"b"}
    assert watch.changed() == frozenset(), "a weight of NaN equals itself here"


def test_a_name_with_several_tensors() -> None:
    packed, scales, offset = torch.zeros(64, 1, dtype=torch.uint8), torch.ones(16), torch.tensor(0.5)
    watch = WeightWatch({"layer": [packed, scales, offset]})
    for each in (packed, scales, offset):
        each.data.add_(2)
        assert watch.changed() == {"layer"}


def test_weights_that_move_are_compared_by_their_values() -> None:
    model = weights("a", "b")
    watch = WeightWatch({name: [weight] for name, weight in model.items()}, moves=True)
    replace_data(model["a"])
    assert watch.changed() == frozenset()
    model["b"].data = model["b"].data + 1
    assert watch.changed() == {"b"}


@pytest.mark.parametrize("pruned", [(slice(None), slice(None, None, 2)), (slice(None), slice(1, None, 2))])
@pytest.mark.parametrize("shape", [(16, 16), (24, 40), (64, 4096)])
def test_zeros_in_regular_places_hide_no_write(pruned: tuple[slice, slice], shape: tuple[int, int]) -> None:
    weight = torch.randn(*shape)
    weight[pruned] = 0
    watch = WeightWatch({"layer": [weight]})
    weight.data.mul_(2)
    assert watch.changed() == {"layer"}


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 15), (8, 16), (1, 4096), (4096, 1), (), (5,), (4096,), (0, 4)])
def test_a_sample_lies_within_the_weight(shape: tuple[int, ...]) -> None:
    weight = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    found = sample_of(weight)
    assert found.numel() <= 64 and found.unique().numel() == found.numel()
    assert set(found.flatten().tolist()) <= set(weight.flatten().tolist())
    turned = sample_of(weight.t()) if weight.dim() == 2 else found
    assert set(turned.flatten().tolist()) <= set(weight.flatten().tolist())


def test_weights_that_others_replace_are_followed() -> None:
    weight, same = torch.randn(16, 16), torch.zeros(())
    other = weight + 1
    watch = WeightWatch({"a": [weight], "b": [same]})
    watch.follow({"a": [other], "b": [same]})
    assert watch.changed() == {"a"}
    watch.follow({"a": [weight], "b": [same]})
    watch.follow({"a": [weight], "b": [same]})
    assert watch.changed() == {"a"} and not watch.changed()


def test_weights_are_not_kept_alive() -> None:
    model = weights("a")
    watch = WeightWatch({name: [weight] for name, weight in model.items()})
    gone = weakref.ref(model["a"])
    del model
    gc.collect()
    assert gone() is None and watch.changed() == frozenset()


# --- Fingerprints -----------------------------------------------------------------------------------------------------


def some_weights(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed, shape in enumerate(shapes)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_fingerprint_outlives_another_dtype_a_copy_and_a_layout(dtype: torch.dtype) -> None:
    some = some_weights((100, 300), (300, 100))
    expected = fingerprint(some)
    assert len(expected) == 32 and set(expected) <= set("0123456789abcdef")
    assert fingerprint(each.to(dtype) for each in some) == expected
    assert fingerprint(nn.Parameter(each.t().contiguous().t()) for each in some) == expected


@pytest.mark.parametrize("shape", [(3, 5), (64, 64), (130, 40), (1000, 129)])
def test_a_fingerprint_tells_weights_apart(shape: tuple[int, ...]) -> None:
    first, second = some_weights(shape, shape)
    others = [[second], [first * 1.01], [first, second], [second, first], [first[:-1]], [first.t()], [first.roll(1, 0)]]
    found = [fingerprint([first]), *map(fingerprint, others)]
    assert len(set(found)) == len(found)


def test_a_pruned_weight_has_a_fingerprint_of_its_own() -> None:
    """Every second column is zero, as 2:4 pruning leaves it, or every fourth: those that are read are not all zeros."""
    first, second = some_weights((256, 256), (256, 256))
    for each in (first, second):
        each[:, ::2] = 0
    assert fingerprint([first]) != fingerprint([second])


@pytest.mark.parametrize("shape", [(), (7,), (0, 4), (2, 3, 4)])
def test_a_fingerprint_takes_any_shape(shape: tuple[int, ...]) -> None:
    assert len(fingerprint([torch.ones(shape)])) == 32
