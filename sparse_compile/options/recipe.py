"""A recipe: what context tokens compute at each site in place of its frozen block, as data that is saved and shared.

A recipe is a folder with two files. `recipe.safetensors` holds the maps, and in its metadata all else that a recipe is;
`recipe.json` is a copy of that metadata for people.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from sparse_compile.options import checks as check

__all__ = ["AffineMap", "ExitRecipe", "Recipe", "SiteRecipe", "recipe_option"]

FORMAT: Final = 1
"""Version of the files: raised whenever older ones can no longer be read as they were meant."""

DATA_FILE: Final = "recipe.json"
TENSORS_FILE: Final = "recipe.safetensors"


@dataclass(frozen=True, eq=False)
class AffineMap:
    """Hold an affine map of low rank, `y = U (Q x) + b`, over the last dimension.

    Attributes:
        q: (r, in); r may be 0: then the map is the constant b.
        u: (out, r).
        bias: (out,).

    Raises:
        ValueError: The shapes do not fit each other, or a number is NaN or infinite.
    """

    q: Tensor
    u: Tensor
    bias: Tensor

    def __post_init__(self) -> None:
        shapes = [tuple(each.shape) for each in (self.q, self.u, self.bias)]
        if [len(shape) for shape in shapes] != [2, 2, 1] or shapes[1] != (*shapes[2], shapes[0][0]):
            raise ValueError(f"an affine map has q (r, in), u (out, r) and a bias (out,), got {shapes}")
        if not all(bool(each.isfinite().all()) for each in (self.q, self.u, self.bias)):
            raise ValueError("an affine map holds NaN or infinity")

    @property
    def rank(self) -> int:
        """Width between the two factors."""
        return self.q.shape[0]

    def __call__(self, x: Tensor) -> Tensor:
        """Return the map of x, (..., in) to (..., out)."""
        return x @ self.q.mT @ self.u.mT + self.bias


@dataclass(frozen=True, eq=False)
class SiteRecipe:
    """What context tokens compute at one site.

    Attributes:
        surrogate: The map in place of the whole feed-forward block; None where channels are left out instead.
        sparsity: Without a map, the fraction of channels that are left out, chosen for each batch; in [0, 1).
        weights: Fingerprint of the frozen weights that the map was fitted for; empty where any will do.
        error: Held-out error of the map, relative to the best constant's; None where it is not known.

    Raises:
        ValueError: A sparsity that is none, or one beside a map.
    """

    surrogate: AffineMap | None = None
    sparsity: float = 0.0
    weights: str = ""
    error: float | None = None

    def __post_init__(self) -> None:
        is_number = isinstance(self.sparsity, int | float) and not isinstance(self.sparsity, bool)
        if not is_number or not 0 <= self.sparsity < 1:
            raise ValueError(f"the sparsity of a site lies in [0, 1), got {self.sparsity!r}")
        if self.surrogate is not None and self.sparsity:
            raise ValueError("a map stands for the whole block: a site has a map or a sparsity, not both")


@dataclass(frozen=True, eq=False)
class ExitRecipe:
    """Where context tokens leave the residual stream, and how later blocks see them.

    Attributes:
        site: Name of the attention block before which they leave, as `explain` shows it.
        maps: By name of each attention block behind it, the map that is added to the stream of the exit. It reads what
            the block of the exit does.

    Raises:
        ValueError: No name, or something else than a map.
    """

    site: str
    maps: Mapping[str, SiteRecipe]

    def __post_init__(self) -> None:
        if not isinstance(self.site, str) or not self.site:
            raise ValueError(f"an exit has the name of an attention block, got {self.site!r}")
        for name, each in self.maps.items():
            if not isinstance(name, str) or not isinstance(each, SiteRecipe) or each.surrogate is None:
                raise ValueError(f"an exit has a SiteRecipe with a map for each block, got {each!r} at {name!r}")
        object.__setattr__(self, "maps", dict(self.maps))


@dataclass(frozen=True, eq=False)
class Recipe:
    """Hold what each site computes for context tokens; a site that is not named stays dense.

    Attributes:
        sites: By site name, as `explain` shows it.
        origin: What the recipe was made from and what was expected of it, for people: plain data.
        folder: Where it was read from; None for one that was made here.
        exit: Where context tokens leave the residual stream; None where they stay to the end.
        dense_every: Of how many steps of the sparse phase one is dense, at least 2, for the maps to be fitted anew to;
            None where the recipe says nothing of it.
        end_step: First dense step after the sparse phase: a fraction of the run, or a number of optimizer steps; None
            where the recipe says nothing of it. The options of these two names come before what a recipe says.

    Raises:
        ValueError: What stands at a name is no `SiteRecipe`, or `dense_every` or `end_step` is none.
    """

    sites: Mapping[str, SiteRecipe]
    origin: Mapping[str, Any] = field(default_factory=dict)
    folder: str | None = None
    exit: ExitRecipe | None = None
    dense_every: int | None = None
    end_step: float | int | None = None

    def __post_init__(self) -> None:
        if self.exit is not None and not isinstance(self.exit, ExitRecipe):
            raise ValueError(f"the exit of a recipe is an ExitRecipe, got {type(self.exit).__name__}")
        for name, site in self.sites.items():
            if not isinstance(name, str) or not isinstance(site, SiteRecipe):
                raise ValueError(f"a recipe has a SiteRecipe for each site name, got {name!r}: {type(site).__name__}")
        # Copies: what the caller does to its own afterwards changes no recipe.
        object.__setattr__(self, "sites", dict(self.sites))
        object.__setattr__(self, "origin", dict(self.origin))
        object.__setattr__(self, "dense_every", check.dense_every(self.dense_every))
        object.__setattr__(self, "end_step", check.step("end_step", self.end_step))

    @cached_property
    def digest(self) -> str:
        """What tells this recipe from another: of all it says of sites, maps included."""
        said = {key: value for key, value in self._data().items() if key != "origin"}
        digest = hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=16)
        for name, tensor in sorted(self._tensors().items()):
            digest.update(name.encode())
            digest.update(tensor.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        maps = sum(site.surrogate is not None for site in self.sites.values())
        leaves = f", context leaves before {self.exit.site}" if self.exit else ""
        return f"Recipe({len(self.sites)} sites, {maps} maps{leaves}, {self.folder or self.digest})"

    @classmethod
    def of_sparsities(cls, layer_sparsity: Mapping[str, float]) -> Recipe:
        """Make a recipe of a published schedule: channels chosen for each batch, no map.

        Args:
            layer_sparsity: Site name to the fraction of channels left out, as in `SparseLoRAConfig.layer_sparsity`.
        """
        return cls({name: SiteRecipe(sparsity=value) for name, value in layer_sparsity.items()})

    def without(self, *names: str) -> Recipe:
        """Return the recipe with some sites left dense; without the block of its exit, context stays to the end.

        Raises:
            ValueError: A name that it does not have.
        """
        known = [*self.sites, *([self.exit.site] if self.exit else [])]
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"the recipe has no site {unknown[0]!r}; it has {', '.join(known) or 'none'}")
        kept = {name: site for name, site in self.sites.items() if name not in names}
        exit_ = self.exit if self.exit and self.exit.site not in names else None
        return Recipe(kept, self.origin, None, exit_, self.dense_every, self.end_step)

    def with_schedule(self, dense_every: int | None = None, end_step: float | int | None = None) -> Recipe:
        """Return the recipe with another schedule, or with none; the arguments are the attributes.

        Raises:
            ValueError: A value that is none of the attribute.
        """
        return Recipe(self.sites, self.origin, None, self.exit, dense_every, end_step)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `recipe.safetensors` and `recipe.json` into a folder, which is made where it is absent.

        Each file is replaced at once: a process that is killed leaves the old recipe or the new one.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self._data(), indent=2) + "\n"
        # Clones: two sites may have one map, and no two tensors of a file may share memory.
        tensors = {name: tensor.clone() for name, tensor in self._tensors().items()}
        _replace(target / TENSORS_FILE, safetensors_bytes(tensors, metadata={_METADATA: text}))
        _replace(target / DATA_FILE, text.encode())

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Recipe:
        """Read a recipe that `save` wrote; its tensors are on the CPU.

        Raises:
            ValueError: No such folder or file, one that is damaged, or one of another format.
        """
        file = Path(folder) / TENSORS_FILE
        try:
            with safe_open(file, framework="pt") as opened:
                text = (opened.metadata() or {}).get(_METADATA)
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (it is no mapping)
        except FileNotFoundError:
            raise ValueError(f"{folder} holds no {TENSORS_FILE}: it is no recipe") from None
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
        if text is None:
            raise ValueError(f"{file} says nothing of a recipe: it is some other file of tensors")
        _compare(Path(folder) / DATA_FILE, text)
        try:
            return _read(file, json.loads(text), tensors)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{file} is damaged: {type(error).__name__}: {error}") from error

    def _data(self) -> dict[str, Any]:
        data = {"format": FORMAT, "origin": dict(self.origin), "sites": _listed(self.sites)}
        if self.exit is not None:
            data["exit"] = {"site": self.exit.site, "maps": _listed(self.exit.maps)}
        # What is not said is not written: a recipe without a schedule is the file that it was before there were any.
        schedule = {"dense_every": self.dense_every, "end_step": self.end_step}
        return data | {name: value for name, value in schedule.items() if value is not None}

    def _tensors(self) -> dict[str, Tensor]:
        groups = ("", self.sites), (_EXIT, self.exit.maps if self.exit else {})
        return {
            f"{group}{name}.{part}": getattr(site.surrogate, part).detach().cpu().contiguous()
            for group, sites in groups
            for name, site in sites.items()
            if site.surrogate is not None
            for part in _PARTS
        }


_METADATA: Final = "recipe"
_PARTS: Final = ("q", "u", "bias")
_EXIT: Final = "exit:"
"""What the names of tensors begin with that are maps of the exit."""


def _listed(sites: Mapping[str, SiteRecipe]) -> dict[str, Any]:
    return {
        name: {
            "rank": None if site.surrogate is None else site.surrogate.rank,
            "sparsity": site.sparsity,
            "error": site.error,
            "weights": site.weights,
        }
        for name, site in sites.items()
    }


def _read(file: Path, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Recipe:
    if data.get("format") != FORMAT:
        raise ValueError(f"{file} has format {data.get('format')!r}, and this version reads {FORMAT}: calibrate again")
    leaves = data.get("exit")
    exit_ = None if leaves is None else ExitRecipe(leaves["site"], _read_sites(file, leaves["maps"], tensors, _EXIT))
    sites = _read_sites(file, data["sites"], tensors, "")
    schedule = data.get("dense_every"), data.get("end_step")
    try:
        return Recipe(sites, data["origin"], str(file.parent), exit_, *schedule)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _read_sites(
    file: Path, listed: Mapping[str, Any], tensors: Mapping[str, Tensor], group: str
) -> dict[str, SiteRecipe]:
    sites = {}
    for name, site in listed.items():
        try:
            mapped = site["rank"] is not None
            surrogate = AffineMap(*(tensors[f"{group}{name}.{part}"] for part in _PARTS)) if mapped else None
            sites[name] = SiteRecipe(surrogate, site["sparsity"], site["weights"], site["error"])
        except KeyError as error:
            raise ValueError(f"{file} lacks {error}") from None
        except ValueError as error:
            raise ValueError(f"{file}: {name}: {error}") from None
    return sites


def recipe_option(value: object) -> Recipe | None:
    """Accept a recipe, the folder of one, which is read, or None."""
    if value is None or isinstance(value, Recipe):
        return value
    folder = check.path("recipe", value)
    assert folder is not None, "only None is no path"
    return Recipe.load(folder)


def _compare(copy: Path, text: str) -> None:
    """Warn where the copy for people says something else than what is used."""
    try:
        same = json.loads(copy.read_text(encoding="utf-8")) == json.loads(text)
    except (OSError, ValueError):
        return  # a copy that is not there misleads nobody
    if not same:
        warnings.warn(
            f"sparselora: {copy} differs from what {TENSORS_FILE} beside it holds, and the latter is used. To leave a "
            "site out, save Recipe.load(folder).without(name).",
            stacklevel=4,
        )


def _replace(target: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
