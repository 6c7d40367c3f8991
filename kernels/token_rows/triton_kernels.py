"""The Triton kernels that split tokens by role and merge them: each row is read and written once."""

import triton
import triton.language as tl


@triton.jit
def take(
    x,
    output_rows,
    context_rows,
    columns,
    output,
    context,
    outputs,
    width,
    kept,
    x_row,
    x_col,
    HAS_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy a tile of one row of x (N, width) to its place in output (outputs, width) or context (N - outputs, kept)."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if row < outputs:
        source = tl.load(output_rows + row) * x_row
        tl.store(output + row * width + at, tl.load(x + source + at * x_col, mask=at < width), mask=at < width)
    else:
        row -= outputs
        source = tl.load(context_rows + row) * x_row
        column = at
        if HAS_COLUMNS:
            column = tl.load(columns + at, mask=at < kept, other=0).to(tl.int32)
        tl.store(context + row * kept + at, tl.load(x + source + column * x_col, mask=at < kept), mask=at < kept)


@triton.jit
def put(
    output,
    context,
    output_rows,
    context_rows,
    places,
    merged,
    outputs,
    width,
    output_row,
    output_col,
    context_row,
    context_col,
    HAS_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy a tile of one row of output or context to its place in merged (N, width).

    With columns, `places` says for each channel of the result which channel of context it is; -1 is zero.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if row < outputs:
        target = tl.load(output_rows + row) * width
        value = tl.load(output + row * output_row + at * output_col, mask=at < width)
        tl.store(merged + target + at, value, mask=at < width)
    else:
        row -= outputs
        target = tl.load(context_rows + row) * width
        place = at
        if HAS_COLUMNS:
            place = tl.load(places + at, mask=at < width, other=-1)
        inside = (at < width) & (place >= 0)
        value = tl.load(context + row * context_row + place * context_col, mask=inside, other=0.0)
        tl.store(merged + target + at, value, mask=at < width)
