"""The Triton kernel that finds the largest of some numbers, in the order of their indices."""

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
