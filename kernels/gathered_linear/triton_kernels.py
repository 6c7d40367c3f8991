"""The Triton kernel of both gathered products: y = x @ M.T, where M is W[idx], W[:, idx] or W itself."""

import triton
import triton.language as tl


@triton.jit
def gathered_product(
    x,
    w,
    channels,
    y,
    rows,
    columns,
    depth,
    x_row,
    x_depth: tl.constexpr,
    w_row,
    w_depth,
    GATHER: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Compute a (BLOCK_M, BLOCK_N) tile of y (rows, columns), contiguous, over `depth` products an element.

    GATHER says which indices of W come from `channels`: "rows" (columns of y), "depth", or "none". Indices are loaded
    in the kernel. Sums are fp32; offsets of rows are int64. GROUP tiles of rows run side by side for the sake of L2.
    """
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(columns, BLOCK_N)
    program = tl.program_id(0)
    group = program // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    tile_m = group * GROUP + program % (GROUP * tiles_n) % height
    tile_n = program % (GROUP * tiles_n) // height

    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    if GATHER == "rows":
        w_rows = tl.load(channels + n, mask=n < columns, other=0).to(tl.int64)
    else:
        w_rows = n.to(tl.int64)
    x_tile = x + m.to(tl.int64)[:, None] * x_row
    w_tile = w + w_rows[None, :] * w_row

    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, depth, BLOCK_K):
        at = start + k
        if GATHER == "depth":
            w_at = tl.load(channels + at, mask=at < depth, other=0).to(tl.int64)
        else:
            w_at = at.to(tl.int64)
        left = tl.load(x_tile + at[None, :] * x_depth, mask=(m[:, None] < rows) & (at[None, :] < depth), other=0.0)
        right = tl.load(
            w_tile + w_at[:, None] * w_depth, mask=(n[None, :] < columns) & (at[:, None] < depth), other=0.0
        )
        right = right.to(left.dtype)
        if INTERPRETED:
            # The interpreter multiplies the bits of bf16 numbers as integers.
            left, right = left.to(tl.float32), right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision=PRECISION)

    out = y + m.to(tl.int64)[:, None] * columns + n[None, :]
    tl.store(out, total.to(y.dtype.element_ty), mask=(m[:, None] < rows) & (n[None, :] < columns))
