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
    """Copy a tile of one row of x (N, width) to its slot in output (outputs, width) or context (contexts, kept).

    A spare slot, whose row is -1, holds row 0.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if row < outputs:
        source = tl.maximum(tl.load(output_rows + row), 0) * x_row
        tl.store(output + row * width + at, tl.load(x + source + at * x_col, mask=at < width), mask=at < width)
    else:
        row -= outputs
        source = tl.maximum(tl.load(context_rows + row), 0) * x_row
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

    With columns, `places` says for each channel of the result which channel of context it is; -1 is zero. A spare slot,
    whose row is -1, is written nowhere.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if row < outputs:
        target = tl.load(output_rows + row)
        inside = at < tl.where(target >= 0, width, 0)
        value = tl.load(output + row * output_row + at * output_col, mask=inside)
        tl.store(merged + target * width + at, value, mask=inside)
    else:
        row -= outputs
        target = tl.load(context_rows + row)
        place = at
        if HAS_COLUMNS:
            place = tl.load(places + at, mask=at < width, other=-1)
        live = at < tl.where(target >= 0, width, 0)
        value = tl.load(context + row * context_row + place * context_col, mask=live & (place >= 0), other=0.0)
        tl.store(merged + target * width + at, value, mask=live)
