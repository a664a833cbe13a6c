"""The online softmax of both attention kernels: sums over keys that are seen a tile at a time, in powers of two.

    weights of a tile = 2 ** (scores - highest so far)       what was summed before shrinks as the highest grows

(Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.)
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def weigh(scores, seen, maximum, MASKED: tl.constexpr):
    """Of scores [queries, keys] in units of log 2, -1e30 where a key is not `seen`: weights, what the sums so far
    shrink by, and the new maximum."""
    highest = tl.maximum(maximum, tl.max(scores, 1))
    weights = tl.exp2(scores - highest[:, None])
    if MASKED:
        weights = tl.where(seen, weights, 0.0)  # of a row that sees nothing here the highest is -1e30 too
    return weights, tl.exp2(maximum - highest), highest


@triton.jit
def with_sink(sink, acc, total, maximum):
    """The sums with one more score, in units of log 2, which has no value."""
    highest = tl.maximum(maximum, sink)
    shrink = tl.exp2(maximum - highest)
    total = total * shrink + tl.exp2(sink - highest)
    return acc * shrink[:, None], total
