"""Paged attention for rows of many queries, over their cached prefixes and their own chunks alike, in one launch.

What it computes stands in device memory, so a captured graph serves any mix of chunks; and it takes what cuDNN does
not: windows, soft caps, sinks, float32, K and V of different widths, wide heads. Only tiles that a query's end or its
window cuts through are masked:

    keys   [window's edge: masked][seen by all queries of the program][diagonal: masked]
"""

import triton
import triton.language as tl

from engine.triton_fp8 import power
from engine.triton_softmax import LOG2E, weigh, with_sink


@triton.jit
def prefill_kernel(
    query,  # [num_tokens, num_heads, key_dim], any strides but the last
    cache,  # the slab, as elements
    scales,  # the slab, as bytes
    out,  # [num_tokens, num_heads, value_dim]
    work,  # int32 [num_programs, 2]: chunk, and which of its tiles of queries; -1: nothing to do
    chunks,  # int32 [num_chunks, 4]: first token in the step, queries, tokens in all (they are the last), table's start
    tables,  # int32, all rows' block ids one after the other
    sinks,
    query_row,
    query_head,
    first,  # of this layer's K inside a block, in elements
    first_scale,  # of this layer's scales, in bytes
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
    SCALED: tl.constexpr,  # the cache is float8
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
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
    dk = tl.arange(0, KEY_BLOCK)
    dv = tl.arange(0, VALUE_BLOCK)
    low = kv_len - num_queries + part * QUERIES  # the first query's position
    position = low + tl.arange(0, QUERIES)
    q = tl.load(
        query + (token_start + m[:, None]) * query_row + head * query_head + dk[None, :],
        mask=(m[:, None] < num_queries) & (dk[None, :] < KEY_DIM),
        other=0.0,
    )
    key_base = cache + first + kv_head * (BLOCK_SIZE * KEY_DIM)
    value_base = cache + first + (num_kv_heads * KEY_DIM + kv_head * VALUE_DIM) * BLOCK_SIZE
    key_scales = scales + first_scale + kv_head * BLOCK_SIZE
    value_scales = key_scales + num_kv_heads * BLOCK_SIZE
    total = tl.zeros([QUERIES], tl.float32)
    maximum = tl.full([QUERIES], -1e30, tl.float32)
    acc = tl.zeros([QUERIES, VALUE_BLOCK], tl.float32)
    begin = 0
    whole = 0  # from here on no window cuts
    stop = tl.minimum(low + QUERIES, kv_len)
    diagonal = (low + 1) // BLOCK * BLOCK  # from here on causality cuts
    if HAS_WINDOW:
        begin = tl.maximum(low - window + 1, 0) // BLOCK * BLOCK
        last = tl.maximum(low + QUERIES - window, 0)  # the last query's first key
        whole = tl.minimum((last + BLOCK - 1) // BLOCK * BLOCK, stop)
        diagonal = tl.maximum(diagonal, whole)
        acc, total, maximum = _tiles(
            q, acc, total, maximum, begin, whole, stop, position, table, key_base, value_base, key_scales, value_scales,
            block_stride, scale, softcap, window, KEY_DIM, KEY_BLOCK, VALUE_DIM, VALUE_BLOCK, BLOCK_SIZE, BLOCK, True,
            HAS_WINDOW, HAS_CAP, SCALED, PRECISION, STAGES,
        )  # fmt: skip
    acc, total, maximum = _tiles(
        q, acc, total, maximum, whole, diagonal, stop, position, table, key_base, value_base, key_scales, value_scales,
        block_stride, scale, softcap, window, KEY_DIM, KEY_BLOCK, VALUE_DIM, VALUE_BLOCK, BLOCK_SIZE, BLOCK, False,
        HAS_WINDOW, HAS_CAP, SCALED, PRECISION, STAGES,
    )  # fmt: skip
    acc, total, maximum = _tiles(
        q, acc, total, maximum, diagonal, stop, stop, position, table, key_base, value_base, key_scales, value_scales,
        block_stride, scale, softcap, window, KEY_DIM, KEY_BLOCK, VALUE_DIM, VALUE_BLOCK, BLOCK_SIZE, BLOCK, True,
        HAS_WINDOW, HAS_CAP, SCALED, PRECISION, STAGES,
    )  # fmt: skip
    if HAS_SINKS:
        acc, total = with_sink(tl.load(sinks + head).to(tl.float32) * LOG2E, acc, total, maximum)
    result = acc / total[:, None]
    at = ((token_start + m[:, None]) * num_kv_heads * GROUP + head) * VALUE_DIM + dv[None, :]
    tl.store(out + at, result.to(out.dtype.element_ty), mask=(m[:, None] < num_queries) & (dv[None, :] < VALUE_DIM))


@triton.jit
def _tiles(
    q,
    acc,
    total,
    maximum,
    begin,  # first key, a whole number of tiles
    end,  # no tile begins there or behind
    stop,  # no key of this program lies there or behind
    position,
    table,
    key_base,
    value_base,
    key_scales,
    value_scales,
    block_stride,
    scale,
    softcap,
    window,
    KEY_DIM: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    n = tl.arange(0, BLOCK)
    dk = tl.arange(0, KEY_BLOCK)
    dv = tl.arange(0, VALUE_BLOCK)
    for start in tl.range(begin, end, BLOCK, num_stages=STAGES):
        token = start + n
        if BLOCK_SIZE % BLOCK == 0:  # a tile lies in one block
            block = tl.load(table + start // BLOCK_SIZE).to(tl.int64) * block_stride
            place = start % BLOCK_SIZE + n
        else:
            block = tl.load(table + token // BLOCK_SIZE, mask=token < stop, other=0).to(tl.int64) * block_stride
            place = token % BLOCK_SIZE
        keys = block + place * KEY_DIM
        values = block + place * VALUE_DIM
        if KEY_DIM == KEY_BLOCK:
            k = tl.load(key_base + keys[None, :] + dk[:, None])
        else:
            k = tl.load(key_base + keys[None, :] + dk[:, None], mask=dk[:, None] < KEY_DIM, other=0.0)
        if SCALED:
            key_scale = power(tl.load(key_scales + block + place, mask=token < stop, other=0))
            scores = tl.dot(q, k.to(q.dtype), input_precision=PRECISION) * key_scale[None, :]
        else:
            scores = tl.dot(q, k, input_precision=PRECISION)
        if HAS_CAP:
            scores = softcap * LOG2E * _tanh(scores * (scale / softcap), PRECISION == "ieee")
        else:
            scores = scores * (scale * LOG2E)
        seen = token[None, :] <= position[:, None]
        if MASKED:
            if HAS_WINDOW:
                seen = seen & (token[None, :] > position[:, None] - window)
            scores = tl.where(seen, scores, -1e30)
        weights, shrink, maximum = weigh(scores, seen, maximum, MASKED)
        if MASKED or VALUE_DIM != VALUE_BLOCK:  # what an unused slot holds may be NaN
            v = tl.load(
                value_base + values[:, None] + dv[None, :],
                mask=(token[:, None] < stop) & (dv[None, :] < VALUE_DIM),
                other=0.0,
            )
        else:
            v = tl.load(value_base + values[:, None] + dv[None, :])
        if SCALED:
            value_scale = power(tl.load(value_scales + block + place, mask=token < stop, other=0))
            v = (v.to(tl.float32) * value_scale[:, None]).to(q.dtype)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, total, maximum


@triton.jit
def _tanh(x, EXACT: tl.constexpr):
    if EXACT:
        return 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0
    # the device's own, good to 11 bits, as half precision is
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
