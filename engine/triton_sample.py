"""Choosing tokens on the device: argmax with or without Gumbel noise, and truncation by threshold search, not sort.

The random bits are those of sampler.uniform_bits.
"""

import triton
import triton.language as tl


@triton.jit
def _mix32(x):
    x ^= x >> 16
    x *= tl.full([], 0x21F0AAAD, tl.uint32)
    x ^= x >> 15
    x *= tl.full([], 0x735A2D97, tl.uint32)
    return x ^ (x >> 15)


@triton.jit
def _gumbel(token, low, high):
    """-log(-log(1 - u)); log(1 - u) by Kahan's correction, precise for small u where the noise is large."""
    bits = _mix32(_mix32(token.to(tl.uint32) ^ low) ^ high)
    u = tl.minimum((bits.to(tl.float32) + 0.5) * (2.0**-32), 1.0 - 2.0**-24)
    w = 1.0 - u
    exponential = tl.where(w == 1.0, u, -tl.log(w) * u / tl.where(w == 1.0, 1.0, 1.0 - w))
    return -tl.log(exponential)


@triton.jit(do_not_specialize=["num_rows"])
def pick_kernel(
    logits,  # [num_rows, vocab_size], row stride given
    best,  # float32 [num_rows, num_parts]
    best_token,  # int32 [num_rows, num_parts]; -1: the part holds NaN or Inf
    keys,  # int32 [2, num_rows]: low and high half of each row's key
    temperatures,  # float32 [num_rows], 0: greedy
    stride,
    vocab_size,
    num_rows,
    CHECK: tl.constexpr,  # whether a value that is not finite spoils the row
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    row = tl.program_id(0)
    part = tl.program_id(1)
    temperature = tl.load(temperatures + row)
    low = tl.load(keys + row).to(tl.uint32, bitcast=True)
    high = tl.load(keys + num_rows + row).to(tl.uint32, bitcast=True)
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    winner = tl.zeros([BLOCK], tl.int32)
    bad = tl.zeros([BLOCK], tl.int32)
    for step in range(STEPS):
        token = (part * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        inside = token < vocab_size
        score = tl.load(logits + row.to(tl.int64) * stride + token, mask=inside, other=0.0).to(tl.float32)
        if CHECK:
            bad |= ((score - score) != 0.0).to(tl.int32)  # NaN and Inf
        if temperature > 0:
            score = score / temperature + _gumbel(token, low, high)
        score = tl.where(inside, score, float("-inf"))
        better = score > highest
        highest = tl.where(better, score, highest)
        winner = tl.where(better, token, winner)
    top = tl.max(highest, 0)
    chosen = tl.min(tl.where(highest == top, winner, 2147483647), 0)  # of equals the first, as argmax
    if CHECK:
        chosen = tl.where(tl.max(bad, 0) > 0, -1, chosen)
    tl.store(best + row * tl.num_programs(1) + part, top)
    tl.store(best_token + row * tl.num_programs(1) + part, chosen)


@triton.jit
def pick_last_kernel(best, best_token, tokens, num_parts, PARTS: tl.constexpr):
    """tokens: int64 [num_rows], -1 where a row is not finite."""
    row = tl.program_id(0)
    part = tl.arange(0, PARTS)
    inside = part < num_parts
    value = tl.load(best + row * num_parts + part, mask=inside, other=float("-inf"))
    token = tl.load(best_token + row * num_parts + part, mask=inside, other=2147483647)
    top = tl.max(value, 0)
    chosen = tl.min(tl.where(inside & (value == top), token, 2147483647), 0)
    chosen = tl.where(tl.min(token, 0) < 0, -1, chosen)
    tl.store(tokens + row, chosen.to(tl.int64))


@triton.jit
def _order(score):
    """float32 to uint32, in the same order."""
    bits = score.to(tl.uint32, bitcast=True)
    flip = tl.where((bits >> 31) != 0, tl.full([], 0xFFFFFFFF, tl.uint32), tl.full([], 0x80000000, tl.uint32))
    return bits ^ flip


@triton.jit
def truncate_kernel(
    scores,  # float32 [num_rows, vocab_size], in place
    min_ps,  # float32 [num_rows], 0: off
    top_ks,  # int32 [num_rows], 0: off
    top_ps,  # float32 [num_rows], 1: off
    vocab_size,
    BLOCK: tl.constexpr,
):
    """The threshold of top_k and of top_p is found bit by bit: the largest value that enough lies at or above."""
    row = tl.program_id(0).to(tl.int64)
    base = scores + row * vocab_size
    min_p, top_k, top_p = tl.load(min_ps + row), tl.load(top_ks + row), tl.load(top_ps + row)
    lane = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        top = tl.maximum(top, tl.load(base + start + lane, mask=start + lane < vocab_size, other=float("-inf")))
    maximum = tl.max(top, 0)
    floor = tl.full([], float("-inf"), tl.float32)
    if min_p > 0:
        floor = maximum + tl.log(min_p)
    threshold = _order(floor)
    if top_k > 0:
        found = tl.full([], 0, tl.uint32)
        bit = tl.full([], 0x80000000, tl.uint32)
        for _ in range(32):
            candidate = found | bit
            bit = bit >> 1
            count = tl.zeros([BLOCK], tl.int32)
            for start in range(0, vocab_size, BLOCK):
                inside = start + lane < vocab_size
                order = _order(tl.load(base + start + lane, mask=inside, other=float("-inf")))
                count += (inside & (order >= candidate) & (order >= threshold)).to(tl.int32)
            if tl.sum(count, 0) >= top_k:
                found = candidate
        threshold = tl.maximum(threshold, found)
    if top_p < 1:
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab_size, BLOCK):
            score = tl.load(base + start + lane, mask=start + lane < vocab_size, other=float("-inf"))
            total += tl.where(_order(score) >= threshold, tl.exp(score - maximum), 0.0)
        wanted = tl.sum(total, 0) * top_p
        found = tl.full([], 0, tl.uint32)
        bit = tl.full([], 0x80000000, tl.uint32)
        for _ in range(32):
            candidate = found | bit
            bit = bit >> 1
            mass = tl.zeros([BLOCK], tl.float32)
            for start in range(0, vocab_size, BLOCK):
                score = tl.load(base + start + lane, mask=start + lane < vocab_size, other=float("-inf"))
                order = _order(score)
                mass += tl.where((order >= candidate) & (order >= threshold), tl.exp(score - maximum), 0.0)
            if tl.sum(mass, 0) >= wanted:
                found = candidate
        threshold = tl.maximum(threshold, found)
    for start in range(0, vocab_size, BLOCK):
        inside = start + lane < vocab_size
        score = tl.load(base + start + lane, mask=inside, other=float("-inf"))
        tl.store(base + start + lane, tl.where(_order(score) >= threshold, score, float("-inf")), mask=inside)
