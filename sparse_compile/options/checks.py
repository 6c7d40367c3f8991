"""Checks of the values of options: each returns the value in the form it is kept in, or raises a `ValueError`."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from numbers import Integral, Real
from typing import Any, Generic, TypeVar

from sparse_compile.options.pass_names import pass_names

_V = TypeVar("_V")

_MODE = (
    "mode is Inductor's, and no option beside others: give what the mode stands for as inductor={...}, such as "
    "inductor={'max_autotune': True} (torch._inductor.list_mode_options() says what that is)"
)


class FrozenMapping(Mapping[str, _V], Generic[_V]):
    """Keep a mapping that compares like a dict, cannot change, and can be hashed (where its values can) and pickled."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, _V] | Iterable[tuple[str, _V]] = ()) -> None:
        self._items: dict[str, _V] = dict(items)

    def __getitem__(self, key: str) -> _V:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __reduce__(self) -> tuple[type[FrozenMapping[_V]], tuple[dict[str, _V]]]:
        return type(self), (self._items,)

    def __repr__(self) -> str:
        return repr(self._items)


def listed(names: Iterable[str]) -> str:
    """Return names as they stand in an error."""
    return ", ".join(sorted(map(str, names))) or "none"


def reject_unknown(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise for the first of `given` that is not in `known`, with the one it may have meant."""
    known = list(known)
    for name in given:
        if name not in known:
            if what == "option" and name == "mode":
                raise ValueError(_MODE)
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(f"unknown {what} {name!r}{hint}. Known: {listed(known)}")


def choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    """Accept one of some words."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def boolean(name: str, value: object) -> bool:
    """Accept a bool, and no number in its place."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return value


def integer(name: str, value: object, minimum: int | None = None, limit: int | None = None) -> int:
    """Accept a whole number in [minimum, limit)."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    whole = int(value)
    if minimum is not None and whole < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {whole}")
    if limit is not None and whole >= limit:
        raise ValueError(f"{name} must be below {limit}, got {whole}")
    return whole


def optional_integer(name: str, value: object, minimum: int) -> int | None:
    """Accept a whole number of at least `minimum`, or None."""
    return None if value is None else integer(name, value, minimum=minimum)


def dense_every(value: object) -> int | None:
    """Accept of how many steps one is dense, or None."""
    return optional_integer("dense_every", value, minimum=2)


def path(name: str, value: object) -> str | None:
    """Accept a path, or None."""
    if value is None:
        return None
    if not isinstance(value, str | os.PathLike) or not isinstance(text := os.fspath(value), str) or not text:
        raise ValueError(f"{name} must be a path, got {value!r}")
    return text


def predictor_tokens(value: object) -> str | int:
    """Accept a number of tokens, or one of two words."""
    if value in ("mean", "all"):
        return str(value)
    if isinstance(value, str):
        raise ValueError(f"predictor_tokens must be 'mean', 'all' or a number of tokens, got {value!r}")
    return integer("predictor_tokens", value, minimum=1)


def number(name: str, value: object) -> float:
    """Accept a number, and no bool in its place."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name} must be a number, got {value!r}")
    return float(value)


def depth(name: str, value: object) -> float | None:
    """Check a fraction of a model's depth, or None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name} is a fraction of the depth in [0, 1], or None, got {value!r}")
    return float(value)


def mask_threshold(value: object) -> float:
    """Accept a fraction in (0, 1]."""
    threshold = number("mask_threshold", value)
    if not 0 < threshold <= 1:  # NaN fails this comparison too
        raise ValueError(f"mask_threshold is a fraction of zeros in (0, 1], got {value!r}")
    return threshold


def step(name: str, value: object) -> float | int | None:
    """Accept a number of steps, a fraction of the run, or None."""
    if value is None:
        return None
    if not isinstance(value, bool) and isinstance(value, Integral):
        return integer(name, value, minimum=0)
    fraction = number(name, value)
    if not 0 <= fraction <= 1:
        raise ValueError(f"{name} as a float is a fraction in [0, 1] (steps are an int), got {value!r}")
    return fraction


def layer_sparsity(value: object) -> FrozenMapping[float] | None:
    """Accept a mapping from names of sites to sparsities in [0, 1), or None."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ValueError(f"layer_sparsity must map site names to sparsities, got {value!r}")
    checked: dict[str, float] = {}
    for site, given in value.items():
        if not isinstance(site, str) or not all(site.split(".")):
            raise ValueError(f"layer_sparsity: {site!r} is not a dotted site name")
        sparsity = number(f"layer_sparsity[{site!r}]", given)
        # NaN fails this comparison too.
        if not 0 <= sparsity < 1:
            percent = f": a fraction, so {sparsity / 100:g}?" if 1 < sparsity < 100 else ""
            raise ValueError(f"layer_sparsity[{site!r}] must lie in [0, 1), got {given!r}{percent}")
        checked[site] = sparsity
    return FrozenMapping(checked)


def disable(value: object) -> frozenset[str]:
    """Accept a collection of names of passes."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ValueError(f"disable must be a collection of pass names, got {value!r}")
    names = frozenset(value)
    if names:
        reject_unknown(names, pass_names(), "pass")
    return names


def inductor(value: object) -> FrozenMapping[Any]:
    """Accept a mapping of Inductor's own options."""
    if not isinstance(value, Mapping):
        raise ValueError(f"inductor must be a dict of Inductor options, got {value!r}")
    if value:
        from sparse_compile.torch_private.inductor import inductor_options

        known = inductor_options()
        # Inductor reads dashes as underscores.
        unknown = [key for key in value if str(key).replace("-", "_") not in known]
        if unknown:
            close = difflib.get_close_matches(str(unknown[0]), known, n=3)
            hint = f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""
            raise ValueError(f"unknown inductor option {unknown[0]!r}{hint}: see torch._inductor.list_options()")
    return FrozenMapping(value)
