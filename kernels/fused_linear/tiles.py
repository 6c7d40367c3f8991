"""The tile of a gathered product, as a pure function of its sizes: no timing decides while a model trains.

The sizes are chosen by their use of registers and shared memory, which ahead-of-time compilation shows; they were not
tuned on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """A product y (rows, columns) over `depth`.

    Attributes:
        rows: tokens.
        columns: channels of the result.
        depth: channels that are summed over.
        itemsize: bytes of an element of x.
        capability: of the device, such as `(9, 0)`.
        scattered: whether neighbours in a gathered slice of the weight are far apart in memory.
        products: tiles of sums, or of results, that a program holds at once.
    """

    rows: int
    columns: int
    depth: int
    itemsize: int
    capability: tuple[int, int]
    scattered: bool = False
    products: int = 1


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


def choose_tile(problem: Problem) -> Tile:
    """Return the tile of a product.

    A slice of the weight that is scattered costs a memory sector an element, in every tile of rows again. With more
    than one tile of rows it is copied together once instead.
    """
    m = _block(problem.rows, 16, 128 if problem.products <= 2 else 64)
    if problem.itemsize > 2:
        # fp32 products that are not rounded to TF32 run outside the matrix units: small tiles spare registers.
        most = 64 if problem.products == 1 else 32
        return Tile(min(m, 64), _block(problem.columns, 16, most), 32, 4, 2, pack=_packs(problem, min(m, 64)))
    # Sums of 128 x 128 elements fill the registers of eight warps.
    n = _block(problem.columns, 16, 128 if problem.products == 1 else 64)
    k = _block(problem.depth, 16, 64)
    hopper = problem.capability >= (9, 0)
    # Eight warps share the sums of a large tile, and the addresses of the operands of several products.
    large = problem.products > 2 or m * n * problem.products >= 128 * 128
    return Tile(m, n, k, 8 if large else 4, 4 if hopper else 3, pack=_packs(problem, m))


def choose_elementwise_tile(rows: int, columns: int) -> Tile:
    """Return the tile of what is computed element by element: few elements a thread, for each has many operands."""
    return Tile(_block(rows, 16, 32), _block(columns, 16, 64), 32, 4, 2)


def _block(size: int, least: int, most: int) -> int:
    """Return the smallest power of two that covers `size`, within bounds."""
    return max(least, min(most, 1 << max(0, size - 1).bit_length()))


def _packs(problem: Problem, m: int) -> bool:
    return problem.scattered and problem.rows > m
