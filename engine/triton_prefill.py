"""Paged attention for rows of many queries, over their cached prefixes and their own chunks alike, in one launch.

What it computes stands in device memory, so a captured graph serves any mix of chunks; and it takes what torch's flash
attention does not: soft caps, sinks, float32, K and V of different widths, wide heads.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def prefill_kernel(
    query,  # [num_tokens, num_heads, key_dim], any strides but the last
    cache,  # the slab, as elements
    out,  # [num_tokens, num_heads, value_dim]
    work,  # int32 [num_programs, 2]: chunk, and which of its tiles of queries; -1: nothing to do
    chunks,  # int32 [num_chunks, 4]: first token in the step, queries, tokens in all (they are the last), table's start
    tables,  # int32, all rows' block ids one after the other
    sinks,
    query_row,
    query_head,
    first,  # of this layer's K inside a block, in elements
    block_stride,
    scale,
    softcap,
    window,
    num_kv_heads,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,  # per program
    BLOCK: tl.constexpr,  # keys per tile
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(0)
    chunk = tl.load(work + 2 * tl.program_id(1))
    if chunk < 0:
        return
    part = tl.load(work + 2 * tl.program_id(1) + 1)
    token_start = tl.load(chunks + 4 * chunk).to(tl.int64)
    num_queries = tl.load(chunks + 4 * chunk + 1)
    kv_len = tl.load(chunks + 4 * chunk + 2)
    table = tables + tl.load(chunks + 4 * chunk + 3)
    kv_head = (head // GROUP).to(tl.int64)
    m = part * QUERIES + tl.arange(0, QUERIES)
    n = tl.arange(0, BLOCK)
    dk = tl.arange(0, KEY_BLOCK)
    dv = tl.arange(0, VALUE_BLOCK)
    position = kv_len - num_queries + m
    q = tl.load(
        query + (token_start + m[:, None]) * query_row + head * query_head + dk[None, :],
        mask=(m[:, None] < num_queries) & (dk[None, :] < KEY_DIM),
        other=0.0,
    )
    key_base = cache + first + kv_head * (BLOCK_SIZE * KEY_DIM)
    value_base = cache + first + (num_kv_heads * KEY_DIM + kv_head * VALUE_DIM) * BLOCK_SIZE
    total_sum = tl.zeros([QUERIES], tl.float32)
    maximum = tl.full([QUERIES], -1e30, tl.float32)
    acc = tl.zeros([QUERIES, VALUE_BLOCK], tl.float32)
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(kv_len - num_queries + part * QUERIES - window + 1, 0) // BLOCK * BLOCK
    end = tl.minimum(kv_len - num_queries + (part + 1) * QUERIES, kv_len)
    for start in range(begin, end, BLOCK):
        token = start + n
        exists = token < end
        block = tl.load(table + token // BLOCK_SIZE, mask=exists, other=0).to(tl.int64) * block_stride
        keys = block + (token % BLOCK_SIZE) * KEY_DIM
        values = block + (token % BLOCK_SIZE) * VALUE_DIM
        k = tl.load(key_base + keys[None, :] + dk[:, None], mask=exists[None, :] & (dk[:, None] < KEY_DIM), other=0.0)
        scores = tl.dot(q, k, input_precision=PRECISION) * scale
        if HAS_CAP:
            scores = softcap * (2.0 / (1.0 + tl.exp(-2.0 * scores / softcap)) - 1.0)
        seen = token[None, :] <= position[:, None]
        if HAS_WINDOW:
            seen = seen & (token[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores * LOG2E, -1e30)
        highest = tl.maximum(maximum, tl.max(scores, 1))
        weights = tl.where(seen, tl.exp2(scores - highest[:, None]), 0.0)
        shrink = tl.exp2(maximum - highest)
        v = tl.load(
            value_base + values[:, None] + dv[None, :], mask=exists[:, None] & (dv[None, :] < VALUE_DIM), other=0.0
        )
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
        total_sum = total_sum * shrink + tl.sum(weights, 1)
        maximum = highest
    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        highest = tl.maximum(maximum, sink)
        shrink = tl.exp2(maximum - highest)
        total_sum = total_sum * shrink + tl.exp2(sink - highest)
        acc = acc * shrink[:, None]
    result = acc / total_sum[:, None]
    at = ((token_start + m[:, None]) * num_kv_heads * GROUP + head) * VALUE_DIM + dv[None, :]
    tl.store(out + at, result.to(out.dtype.element_ty), mask=(m[:, None] < num_queries) & (dv[None, :] < VALUE_DIM))
