"""Tiles that were measured: an optional table for each architecture, `kernels/configs/<arch>.json`.

`benchmarks/tune.py` writes it on a GPU; nothing is timed while a model trains. An entry is for a kernel, an element
size, a number of products and sizes that are rounded up to powers of two, for the number of context tokens changes from
step to step. What has no entry, and everything where there is no table, has the tile of `tiles.choose_tile`.

    {"format": 1, "arch": "sm_90", "sources": "<hash>",
     "provenance": {"device": .., "versions": {"triton": .., ..}, "date": .., "commit": {..}, "command": ..},
     "entries": [{"problem": {"kernel": "products", "rows": 4096, ..}, "tile": {"m": 128, ..},
                  "seconds": 1.1e-4, "untuned_seconds": 1.3e-4}]}

A table that is malformed, or is for other kernels or another compiler than those at hand, is left out with one warning.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from sparse_compile.kernels.fused_linear.tiles import Problem, Tile, architecture, choose_tile, packs, shared_limit

FORMAT = 1
PROVENANCE = {"device": str, "versions": dict, "date": str, "commit": dict, "command": str}
"""What a table must say about where it comes from."""

_KERNELS = Path(__file__).resolve().parent.parent
_SOURCES = (
    "codegen/kernel_text.py",
    "codegen/packed_tiles.py",
    "codegen/triton_source.py",
    "fused_linear/operands.py",
    "fused_linear/triton.py",
)
"""What the kernels that are tuned are printed and launched by, below `kernels/`."""

_PROBLEM_FIELDS = ("kernel", "rows", "columns", "depth", "itemsize", "scattered", "products")
_TILE_FIELDS = ("m", "n", "k", "warps", "stages", "group")
_chooser: Callable[[Problem], Tile] | None = None


@dataclass(frozen=True)
class Entry:
    """A tile that was measured.

    Attributes:
        problem: what it is for, as `bucket` returns it.
        tile: the fastest.
        seconds: median of a launch, of all calls of the problem together.
        untuned_seconds: the same with the tile that is chosen without a table.
    """

    problem: Problem
    tile: Tile
    seconds: float
    untuned_seconds: float


@dataclass(frozen=True)
class TunedTable:
    """What was measured on one architecture.

    Attributes:
        capability: of the device.
        provenance: see `PROVENANCE`; `versions` holds Triton's at least.
        entries: what was measured.
        sources: hash of the sources of the kernels that were measured.
    """

    capability: tuple[int, int]
    provenance: Mapping[str, Any]
    entries: tuple[Entry, ...]
    sources: str


def tile_for(problem: Problem) -> Tile:
    """Return the tile of a launch: that of the architecture's table, or else `choose_tile`'s."""
    if _chooser is not None:
        return _chooser(problem)
    tile = tuned_tiles(problem.capability).get(bucket(problem))
    return choose_tile(problem) if tile is None else dataclasses.replace(tile, pack=packs(problem, tile.m))


def bucket(problem: Problem) -> Problem:
    """Return the problem that stands for all with sizes between the same powers of two."""
    rows, columns, depth = (
        1 << max(0, size - 1).bit_length() for size in (problem.rows, problem.columns, problem.depth)
    )
    return dataclasses.replace(problem, rows=rows, columns=columns, depth=depth)


def table_path(capability: tuple[int, int]) -> Path:
    """Return the file of an architecture's table, whether it is there or not."""
    return _KERNELS / "configs" / f"{architecture(capability)}.json"


@cache
def tuned_tiles(capability: tuple[int, int]) -> Mapping[Problem, Tile]:
    """Return the tiles of an architecture's table, by bucket; none, with one warning, where it is bad or stale."""
    path = table_path(capability)
    if not path.exists():
        return {}
    try:
        table = read_table(path, capability)
        if reason := staleness(table):
            raise ValueError(reason)
    except (OSError, ValueError) as error:
        warnings.warn(
            f"sparselora: the tuned tiles of {path.name} are left out, and tiles are chosen by their sizes: {error}. "
            "`python benchmarks/tune.py` on such a GPU writes a new table.",
            stacklevel=2,
        )
        return {}
    return {entry.problem: entry.tile for entry in table.entries}


def staleness(table: TunedTable) -> str | None:
    """Say why what was measured does not hold for the kernels at hand, or return None where it does."""
    if table.sources != sources_hash():
        return "the kernels have changed since they were measured"
    import triton

    there = table.provenance["versions"].get("triton")
    if _release(str(there)) != _release(triton.__version__):
        return f"it was measured with triton {there}, this is triton {triton.__version__}"
    return None


@cache
def sources_hash() -> str:
    """Return a hash of the sources of the kernels that are tuned."""
    digest = hashlib.sha256()
    for name in _SOURCES:
        digest.update((_KERNELS / name).read_bytes())
    return digest.hexdigest()[:16]


def write_table(table: TunedTable, path: Path) -> None:
    """Write a table as JSON, one entry a line."""
    head = {
        "format": FORMAT,
        "arch": architecture(table.capability),
        "sources": table.sources,
        "provenance": dict(table.provenance),
    }
    lines = [json.dumps(_entry_to_json(entry)) for entry in table.entries]
    text = json.dumps(head, indent=1)[:-2] + ',\n "entries": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def read_table(path: Path, capability: tuple[int, int]) -> TunedTable:
    """Read and check a table.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no table of that architecture; the message says what is wrong with which part.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"it is not JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"it is not of format {FORMAT}")
    if content.get("arch") != architecture(capability):
        raise ValueError(f"it is for {content.get('arch')!r}, not for {architecture(capability)!r}")
    provenance = content.get("provenance", {})
    for name, kind in PROVENANCE.items():
        if not isinstance(provenance, dict) or not isinstance(provenance.get(name), kind):
            raise ValueError(f"its provenance has no {name}")
    if not isinstance(content.get("sources"), str) or not isinstance(content.get("entries"), list):
        raise ValueError("it has no hash of the kernels' sources, or no list of entries")
    entries = []
    for number, each in enumerate(content["entries"]):
        try:
            entries.append(_entry_from_json(each, capability))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"entry {number}: {error}") from error
    if len({entry.problem for entry in entries}) < len(entries):
        raise ValueError("two entries are for one problem")
    return TunedTable(capability, provenance, tuple(entries), content["sources"])


@contextmanager
def choosing(chooser: Callable[[Problem], Tile]) -> Iterator[None]:
    """Have `chooser` choose the tile of every launch inside the block, for those who measure them."""
    global _chooser
    outer, _chooser = _chooser, chooser
    try:
        yield
    finally:
        _chooser = outer


def _entry_to_json(entry: Entry) -> dict[str, Any]:
    return {
        "problem": {name: getattr(entry.problem, name) for name in _PROBLEM_FIELDS},
        "tile": {name: getattr(entry.tile, name) for name in _TILE_FIELDS},
        "seconds": entry.seconds,
        "untuned_seconds": entry.untuned_seconds,
    }


def _entry_from_json(content: Any, capability: tuple[int, int]) -> Entry:
    if not isinstance(content, dict) or set(content) != {"problem", "tile", "seconds", "untuned_seconds"}:
        raise ValueError("it has not the fields problem, tile, seconds, untuned_seconds")
    problem = Problem(**_checked(content["problem"], Problem, _PROBLEM_FIELDS), capability=capability)
    tile = Tile(**_checked(content["tile"], Tile, _TILE_FIELDS))
    if problem.kernel not in ("products", "gradients"):
        raise ValueError(f"there is no kernel {problem.kernel!r}")
    if problem != bucket(problem):
        raise ValueError("its sizes are no powers of two")
    check_tile(tile, problem)
    for name in ("seconds", "untuned_seconds"):
        if not isinstance(content[name], float) or not content[name] > 0:
            raise ValueError(f"{name} is {content[name]!r}")
    return Entry(problem, tile, content["seconds"], content["untuned_seconds"])


def check_tile(tile: Tile, problem: Problem) -> None:
    """Raise `ValueError` for a tile that no program of the architecture can have."""
    if any(size < 16 or size & (size - 1) for size in (tile.m, tile.n, tile.k)):
        raise ValueError(f"a tile of {tile.m} x {tile.n} x {tile.k}: sizes are powers of two, 16 at least")
    if tile.warps not in (1, 2, 4, 8, 16) or not 1 <= tile.stages <= 8 or tile.group < 1:
        raise ValueError(f"{tile.warps} warps, {tile.stages} stages, groups of {tile.group}")
    used = tile.shared_bytes * problem.itemsize // 2 if problem.kernel == "products" else 0
    if used > shared_limit(problem.capability):
        raise ValueError(f"{used} bytes of shared memory exceed {shared_limit(problem.capability)}")


def _checked(content: Any, kind: type, names: tuple[str, ...]) -> dict[str, Any]:
    """Return fields of a dataclass that were read from JSON, each of the type that the dataclass gives it."""
    if not isinstance(content, dict) or set(content) != set(names):
        raise ValueError(f"{kind.__name__.lower()} has not the fields {', '.join(names)}")
    hints = get_type_hints(kind)
    for name in names:
        wanted = hints[name] if hints[name] in (int, bool) else str
        if type(content[name]) is not wanted:
            raise ValueError(f"{name} is {content[name]!r}")
    return dict(content)


def _release(version: str) -> list[str]:
    """Return the numbers of a version that change with what the compiler makes of a kernel."""
    return version.split("+")[0].split(".")[:2]
