"""Lines of a Triton kernel that load a tile of a weight in 4 bits and dequantise it in registers.

Rows of the stored weight are gathered. A byte holds two neighbours of a row, so a tile of bytes is half as wide as the
tile of numbers that is made of it, and one load of a byte serves both: its halves are looked up in the table of 16
numbers, scaled in fp32, rounded to the dtype of x as the library does, and interleaved. Where what the tile has of a
row lies within one block, a scale is loaded for each row, not for each byte.
"""

from __future__ import annotations

from dataclasses import dataclass

NESTED_BLOCK = 256
"""Scales that share a scale of their own."""


@dataclass(frozen=True)
class FourBit:
    """How a gathered weight is stored.

    Attributes:
        blocksize: elements that share a scale, a power of two.
        whole_rows: whether every row begins with a block.
        nested: whether the scales are quantised themselves.
    """

    blocksize: int
    whole_rows: bool
    nested: bool


def pointers(name: str, form: FourBit) -> list[str]:
    """Return the parameters of a kernel that hold the table and the scales of a term."""
    nested = ("bytes", "code", "offset") if form.nested else ()
    return [f"{kind}_{name}" for kind in ("table", "absmax", *nested)]


def tile_lines(name: str, source: int, form: FourBit, *, along_depth: bool, masked: bool) -> list[str]:
    """Return lines that leave a tile (BLOCK_K, BLOCK_N) in `right`.

    Args:
        name: of the term.
        source: index of its x.
        form: how its weight is stored.
        along_depth: whether the rows of the stored weight lie along the depth, else they are columns of the result.
        masked: whether the tile may reach beyond the depth.
    """
    if along_depth:
        block, begin, deep = "BLOCK_K", "start", f"half[None, :] * 2 < depth_{source}" if masked else ""
        row, within = f"w_rows_{name}", "n[:, None] < columns"
    else:
        block, begin, deep = "BLOCK_N", "tile_n * BLOCK_N", "deep[:, None]" if masked else ""
        index = f"tl.load(channels_{name} + position{', mask=deep, other=0' if masked else ''})"
        row, within = index, "half[None, :] * 2 < columns"
    mask = " & ".join(f"({each})" for each in (within, deep) if each)
    rows_only = "n[:, None] < columns" if along_depth else (deep or "")
    lines = [
        f"row = {row}.to(tl.int64)[:, None]",
        f"half = {begin} // 2 + tl.arange(0, {block} // 2)",
        f"pairs = tl.load(w_{name} + row * w_{name}_row + half[None, :], mask={mask}, other=0)",
    ]
    element = f"(row * w_{name}_row + half[None, :]) // {form.blocksize // 2}"
    if form.whole_rows:
        lines += [
            f"if {block} <= {form.blocksize}:",
            f"    block = row * (w_{name}_row // {form.blocksize // 2}) + {begin} // {form.blocksize}",
            *(f"    {line}" for line in _scale_lines(name, form, rows_only)),
            "else:",
            f"    block = {element}",
            *(f"    {line}" for line in _scale_lines(name, form, mask)),
        ]
    else:
        lines += [f"block = {element}", *_scale_lines(name, form, mask)]
    upper, lower = (
        f"(tl.load(table_{name} + {half}) * scale).to(left.dtype)"
        for half in ("(pairs >> 4).to(tl.int32)", "(pairs & 15).to(tl.int32)")
    )
    lines.append(f"right = tl.interleave({upper}, {lower})")
    return [*lines, "right = tl.trans(right)"] if along_depth else lines


def _scale_lines(name: str, form: FourBit, mask: str) -> list[str]:
    def load(pointer: str) -> str:
        return f"tl.load({pointer}{f', mask={mask}, other=0' if mask else ''})"

    if not form.nested:
        return [f"scale = {load(f'absmax_{name} + block')}"]
    byte = load(f"bytes_{name} + block")
    return [
        f"coarse = {load(f'absmax_{name} + block // {NESTED_BLOCK}')}",
        f"scale = tl.load(code_{name} + {byte}.to(tl.int32)) * coarse + tl.load(offset_{name})",
    ]
