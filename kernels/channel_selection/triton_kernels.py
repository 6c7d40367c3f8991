"""The Triton kernels that predict the norms of channels, and find the largest of some numbers in their indices' order.

Norms are sums in two stages, each in an order that the sizes alone decide: with atomics a near tie would be chosen
differently from run to run.
"""

import triton
import triton.language as tl


@triton.jit
def keys(scores, start, n, informative, CHUNK: tl.constexpr):
    """Return the bits of a chunk of numbers that are not negative: as integers they have the same order.

    All are 0 where the numbers say nothing, and -1 behind their end.
    """
    at = start + tl.arange(0, CHUNK)
    # -0.0 has a sign.
    bits = tl.abs(tl.load(scores + at, mask=at < n, other=0.0)).to(tl.int32, bitcast=True)
    return tl.where(at < n, tl.where(informative, bits, 0), -1)


@triton.jit
def largest_channels(scores, channels, informative, n, k, CHUNK: tl.constexpr):
    """Store the indices of the k largest of n scores, ascending; of equal ones, the first.

    One program does it all: the k-th largest score is found bit by bit, by counting how many are at least as large;
    then what is above it is kept, and of what equals it the first few. Sums of integers have no order that could vary.
    """
    most = 0
    for start in range(0, n, CHUNK):
        most = tl.maximum(most, tl.max(keys(scores, start, n, True, CHUNK), axis=0))
    # Infinity is 0x7F800000, a NaN lies above it.
    useful = (most > 0) & (most < 0x7F800000)
    tl.store(informative, tl.where(useful, 1, 0))

    threshold = 0
    for bit in range(31):
        candidate = threshold + (1 << (30 - bit))
        count = 0
        for start in range(0, n, CHUNK):
            count += tl.sum((keys(scores, start, n, useful, CHUNK) >= candidate).to(tl.int32), axis=0)
        threshold = tl.where(count >= k, candidate, threshold)
    above = 0
    for start in range(0, n, CHUNK):
        above += tl.sum((keys(scores, start, n, useful, CHUNK) > threshold).to(tl.int32), axis=0)

    written = 0
    equals = 0
    for start in range(0, n, CHUNK):
        key = keys(scores, start, n, useful, CHUNK)
        equal = (key == threshold).to(tl.int32)
        kept = (key > threshold) | ((key == threshold) & (equals + tl.cumsum(equal, axis=0) <= k - above))
        place = written + tl.cumsum(kept.to(tl.int32), axis=0) - 1
        tl.store(channels + place, (start + tl.arange(0, CHUNK)).to(tl.int64), mask=kept)
        written += tl.sum(kept.to(tl.int32), axis=0)
        equals += tl.sum(equal, axis=0)


@triton.jit
def gram_partials(
    x,
    weights,
    a,
    grams,
    rows,
    depth,
    x_row,
    x_col,
    a_row,
    a_col,
    RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Store the (BLOCK_R, BLOCK_R) Gram matrix of BLOCK_M rows of u = diag(weights) x A.

    With a bias, u has the weights as one more column, so that the bias is one more row of B.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_R)
    x_rows = x + m.to(tl.int64)[:, None] * x_row
    u = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for start in range(0, depth, BLOCK_K):
        at = (start + k).to(tl.int64)
        tokens = tl.load(x_rows + at[None, :] * x_col, mask=(m[:, None] < rows) & (at[None, :] < depth), other=0.0)
        factor = tl.load(
            a + at[:, None] * a_row + r[None, :] * a_col,
            mask=(at[:, None] < depth) & (r[None, :] < RANK),
            other=0.0,
        )
        u = tl.dot(tokens.to(tl.float32), factor.to(tl.float32), u, input_precision="ieee")
    weight = tl.load(weights + m, mask=m < rows, other=0).to(tl.float32)[:, None]
    # What pads the rank is 0 * inf, a NaN, where a token is not finite.
    u = tl.where(r[None, :] < RANK, u * weight, 0.0)
    if HAS_BIAS:
        u = tl.where(r[None, :] == RANK, weight, u)
    gram = tl.dot(tl.trans(u), u, input_precision="ieee")
    place = grams + tl.program_id(0).to(tl.int64) * BLOCK_R * BLOCK_R
    tl.store(place + r[:, None] * BLOCK_R + r[None, :], gram)


@triton.jit
def norms_of_gram(
    grams,
    b,
    bias,
    norms,
    partials,
    columns,
    b_row,
    b_col,
    RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Store sqrt(b_c' G b_c) of BLOCK_N columns of B, where G is the sum of the partial Gram matrices."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    elements = tl.arange(0, BLOCK_R * BLOCK_R)
    total = tl.zeros((BLOCK_R * BLOCK_R,), dtype=tl.float32)
    for start in range(0, partials, CHUNK):
        part = start + tl.arange(0, CHUNK)
        at = part.to(tl.int64)[:, None] * BLOCK_R * BLOCK_R + elements[None, :]
        total += tl.sum(tl.load(grams + at, mask=part[:, None] < partials, other=0.0), axis=0)
    gram = tl.reshape(total, (BLOCK_R, BLOCK_R))
    vectors = tl.load(
        b + r[:, None].to(tl.int64) * b_row + n[None, :] * b_col,
        mask=(r[:, None] < RANK) & (n[None, :] < columns),
        other=0.0,
    ).to(tl.float32)
    if HAS_BIAS:
        last = tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)
        vectors = tl.where(r[:, None] == RANK, last[None, :], vectors)
    squared = tl.sum(vectors * tl.dot(gram, vectors, input_precision="ieee"), axis=0)
    # Rounding may leave a square below zero; the maximum of a NaN and zero would be zero.
    tl.store(norms + n, tl.sqrt(tl.where(squared < 0.0, 0.0, squared)), mask=n < columns)
