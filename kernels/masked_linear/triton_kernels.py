"""The Triton kernel of masked products: y = x @ M.T, where M = (W + s L R) * (W != 0) exists a tile at a time."""

import triton
import triton.language as tl


@triton.jit
def _tile_of_program(rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Return the rows and columns of this program's tile; GROUP tiles of rows run side by side for the sake of L2."""
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(columns, BLOCK_N)
    program = tl.program_id(0)
    group = program // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    tile_m = group * GROUP + program % (GROUP * tiles_n) % height
    tile_n = program % (GROUP * tiles_n) // height
    return tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def masked_product(
    x, w, left, right, bias, y,
    rows, columns, depth, scale,
    x_row, x_depth, w_column, w_depth, left_column, left_rank, right_rank, right_depth,
    RANK: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Compute a (BLOCK_M, BLOCK_N) tile of y (rows, columns), contiguous, over `depth` products an element.

    W is (columns, depth), L (columns, RANK) and R (RANK, depth), of any strides. A tile of W is merged in fp32, masked
    and rounded to the dtype of x as it is loaded. Sums are fp32; offsets of rows are int64.
    """
    m, n = _tile_of_program(rows, columns, BLOCK_M, BLOCK_N, GROUP)
    k = tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_R)
    wide_n = n.to(tl.int64)
    x_tile = x + m.to(tl.int64)[:, None] * x_row
    w_tile = w + wide_n[None, :] * w_column
    adapter = tl.load(
        left + wide_n[None, :] * left_column + r[:, None] * left_rank,
        mask=(n[None, :] < columns) & (r[:, None] < RANK),
        other=0.0,
    )
    if INTERPRETED:
        # The interpreter multiplies the bits of bf16 numbers as integers.
        adapter = adapter.to(tl.float32)

    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, depth, BLOCK_K):
        at = (start + k).to(tl.int64)
        inside = at < depth
        factor = tl.load(
            right + at[:, None] * right_depth + r[None, :] * right_rank,
            mask=inside[:, None] & (r[None, :] < RANK),
            other=0.0,
        )
        weight = tl.load(w_tile + at[:, None] * w_depth, mask=(n[None, :] < columns) & inside[:, None], other=0.0)
        tokens = tl.load(x_tile + at[None, :] * x_depth, mask=(m[:, None] < rows) & inside[None, :], other=0.0)
        if INTERPRETED:
            factor = factor.to(tl.float32)
        merged = weight.to(tl.float32) + scale * tl.dot(factor, adapter, input_precision=PRECISION)
        merged = tl.where(weight == 0, 0.0, merged).to(tokens.dtype)
        if INTERPRETED:
            tokens, merged = tokens.to(tl.float32), merged.to(tl.float32)
        total = tl.dot(tokens, merged, total, input_precision=PRECISION)

    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    out = y + m.to(tl.int64)[:, None] * columns + wide_n[None, :]
    tl.store(out, total.to(y.dtype.element_ty), mask=(m[:, None] < rows) & (n[None, :] < columns))
