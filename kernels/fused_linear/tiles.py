"""The tile of a kernel, as a pure function of its sizes and the architecture: no timing decides while a model trains.

The sizes are chosen by their use of registers and shared memory, which ahead-of-time compilation shows; they were not
tuned on a GPU. Where they were, `tuned.tile_for` takes what the table of that architecture says instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GFX942 = (9, 4)
"""What PyTorch reports as the capability of AMD's MI300; no NVIDIA GPU has it."""


@dataclass(frozen=True)
class Problem:
    """A product y (rows, columns) over `depth`, or what is computed element by element from some (rows, columns).

    Attributes:
        rows: tokens.
        columns: channels of the result.
        depth: channels that are summed over; of `"gradients"` the rank of the adapters, 0 without.
        itemsize: bytes of an element of x.
        capability: of the device, such as `(9, 0)`.
        scattered: whether neighbours in a gathered slice of the weight are far apart in memory.
        products: tiles of sums, or of results, that a program holds at once.
        kernel: `"products"`, or `"gradients"` for what is computed element by element.
    """

    rows: int
    columns: int
    depth: int
    itemsize: int
    capability: tuple[int, int]
    scattered: bool = False
    products: int = 1
    kernel: Literal["products", "gradients"] = "products"


@dataclass(frozen=True)
class Tile:
    """How a product is cut up.

    Attributes:
        m, n, k: sizes of a tile in rows, columns and depth; powers of two, at least 16 as matrix units ask.
        warps: warps of a program.
        stages: tiles of operands that are in flight.
        group: tiles of rows that run side by side.
        pack: whether the chosen channels are copied together first.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int = 8
    pack: bool = False

    @property
    def shared_bytes(self) -> int:
        """Bytes of operands in flight, for elements of two bytes."""
        return 2 * self.stages * self.k * (self.m + self.n)


def architecture(capability: tuple[int, int]) -> str:
    """Return the compiler's name of an architecture: `"sm_90"`, `"gfx942"`."""
    return "gfx942" if capability == GFX942 else "sm_{}{}".format(*capability)


def shared_limit(capability: tuple[int, int]) -> int:
    """Return the bytes of shared memory that one program may have.

    Source: CUDA C++ Programming Guide, technical specifications by compute capability; CDNA 3 instruction set, local
    data share.
    """
    if capability == GFX942:
        return 64 << 10
    if capability in ((8, 0), (8, 7)):
        return 163 << 10
    return (227 if capability[0] in (9, 10) else 99) << 10


def choose_tile(problem: Problem) -> Tile:
    """Return the tile of a kernel.

    A slice of the weight that is scattered costs a memory sector an element, in every tile of rows again. With more
    than one tile of rows it is copied together once instead.
    """
    if problem.kernel == "gradients":
        return choose_elementwise_tile(problem.rows, problem.columns)
    m = _block(problem.rows, 16, 128 if problem.products <= 2 else 64)
    if problem.itemsize > 2:
        # fp32 products that are not rounded to TF32 run outside the matrix units: small tiles spare registers.
        most = 64 if problem.products == 1 else 32
        return Tile(min(m, 64), _block(problem.columns, 16, most), 32, 4, 2, pack=packs(problem, min(m, 64)))
    # Sums of 128 x 128 elements fill the registers of eight warps.
    n = _block(problem.columns, 16, 128 if problem.products == 1 else 64)
    k = _block(problem.depth, 16, 64)
    # Eight warps share the sums of a large tile, and the addresses of the operands of several products.
    large = problem.products > 2 or m * n * problem.products >= 128 * 128
    tile = Tile(m, n, k, 8 if large else 4, _stages(problem, m, n, k), pack=packs(problem, m))
    assert tile.shared_bytes <= shared_limit(problem.capability), "two tiles in flight fit everywhere"
    return tile


def _stages(problem: Problem, m: int, n: int, k: int) -> int:
    """Return how many tiles are in flight: as deep a pipeline as the architecture gains by, and has the memory for.

    MI300 loads through registers: a second tile in flight is all that helps. Hopper and the data centre's Blackwell
    copy asynchronously into far more shared memory than Ampere has.
    """
    wanted = 2 if problem.capability == GFX942 else 4 if problem.capability[0] in (9, 10) else 3
    return max(2, min(wanted, shared_limit(problem.capability) // Tile(m, n, k, 8, 1).shared_bytes))


def choose_elementwise_tile(rows: int, columns: int) -> Tile:
    """Return the tile of what is computed element by element: few elements a thread, for each has many operands."""
    return Tile(_block(rows, 16, 32), _block(columns, 16, 64), 32, 4, 2)


def _block(size: int, least: int, most: int) -> int:
    """Return the smallest power of two that covers `size`, within bounds."""
    return max(least, min(most, 1 << max(0, size - 1).bit_length()))


def packs(problem: Problem, m: int) -> bool:
    """Tell whether the chosen channels are copied together first, for tiles of m rows."""
    return problem.scattered and problem.rows > m
