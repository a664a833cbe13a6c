"""Paged attention for rows of one query each: a persistent grid whose programs share all tiles of all rows evenly.

    tiles of BLOCK tokens   row 0 |row 1      |row 2                     |        (`tiles` holds the running sum)
    programs                0     |1     |2     |3     |4     |5     |6           equal shares, across row borders

The grid is fixed, so one captured graph serves any lengths. A program that computes a whole row writes its output; of a
row's several programs each leaves a partial (sum, maximum, weights), and the one that arrives last merges them.
After "Stream-K" (Osama et al. 2023) and "Lean Attention" (Sanovar et al. 2024).
"""

import triton
import triton.language as tl

from engine.triton_fp8 import power
from engine.triton_softmax import LOG2E, weigh, with_sink


@triton.jit(do_not_specialize=["num_rows", "min_share"])
def decode_kernel(
    query,  # [num_rows, num_heads, key_dim], any strides but the last
    cache,  # the slab, as elements
    scales,  # the slab, as bytes
    out,  # [num_rows, num_heads, value_dim]
    partial,  # float32 [num_kv_heads, num_programs, 2, GROUP_BLOCK, VALUE_BLOCK]
    stats,  # float32 [num_kv_heads, num_programs, 2, 2, GROUP_BLOCK]: maximum and sum
    arrived,  # int32 [num_rows, num_kv_heads], zero between launches
    kv_lens,  # int32 [num_rows]
    tables,  # int32, all rows' block ids one after the other
    starts,  # int32 [num_rows], where each row's are
    tiles,  # int32 [num_rows + 1], running sum of each row's tiles; rows without any come last
    sinks,
    num_rows,
    query_row,
    query_head,
    first,  # of this layer's K inside a block, in elements
    first_scale,  # of this layer's scales, in bytes
    block_stride,
    scale,
    softcap,
    window,
    min_share,  # tiles: below it a row is not worth splitting
    num_kv_heads,
    GROUP: tl.constexpr,  # query heads per kv head
    GROUP_BLOCK: tl.constexpr,
    KEY_DIM: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,  # tokens per cache block
    BLOCK: tl.constexpr,  # tokens per tile
    ROWS: tl.constexpr,  # power of two >= num_rows
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    SCALED: tl.constexpr,  # the cache is float8
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(1)
    head = tl.program_id(0)
    total = tl.load(tiles + num_rows)
    share = tl.maximum(tl.cdiv(total, tl.num_programs(1)), min_share)
    tile = program * share
    stop = tl.minimum(tile + share, total)
    index = tl.arange(0, ROWS)
    ends = tl.load(tiles + 1 + index, mask=index < num_rows, other=2147483647)
    row = tl.sum((ends <= tile).to(tl.int32), 0)

    g = tl.arange(0, GROUP_BLOCK)
    dk = tl.arange(0, KEY_BLOCK)
    dv = tl.arange(0, VALUE_BLOCK)
    n = tl.arange(0, BLOCK)
    key_base = cache + first + head.to(tl.int64) * (BLOCK_SIZE * KEY_DIM)
    value_base = cache + first + (num_kv_heads * KEY_DIM + head.to(tl.int64) * VALUE_DIM) * BLOCK_SIZE
    slot = (head * tl.num_programs(1) + program) * 2
    while tile < stop:
        row_first = tl.load(tiles + row)
        row_stop = tl.load(tiles + row + 1)
        part_stop = tl.minimum(stop, row_stop)
        kv_len = tl.load(kv_lens + row)
        low = 0
        if HAS_WINDOW:
            low = tl.maximum(kv_len - window, 0)
        skipped = low // BLOCK
        table = tables + tl.load(starts + row)
        q = tl.load(
            query + row.to(tl.int64) * query_row + (head * GROUP + g[:, None]) * query_head + dk[None, :],
            mask=(g[:, None] < GROUP) & (dk[None, :] < KEY_DIM),
            other=0.0,
        )
        total_sum = tl.zeros([GROUP_BLOCK], tl.float32)
        maximum = tl.full([GROUP_BLOCK], -1e30, tl.float32)
        acc = tl.zeros([GROUP_BLOCK, VALUE_BLOCK], tl.float32)
        begin = (tile - row_first + skipped) * BLOCK
        end = (part_stop - row_first + skipped) * BLOCK
        for start in tl.range(begin, end, BLOCK, num_stages=STAGES):
            position = start + n
            seen = position < kv_len
            if HAS_WINDOW:
                seen = seen & (position >= low)
            if BLOCK_SIZE % BLOCK == 0:  # a tile lies in one block
                block = tl.load(table + start // BLOCK_SIZE).to(tl.int64) * block_stride
                token = start % BLOCK_SIZE + n
            else:
                block = tl.load(table + position // BLOCK_SIZE, mask=seen, other=0).to(tl.int64) * block_stride
                token = position % BLOCK_SIZE
            keys = block + token * KEY_DIM
            values = block + token * VALUE_DIM
            if KEY_DIM == KEY_BLOCK:
                k = tl.load(key_base + keys[None, :] + dk[:, None])
            else:
                k = tl.load(key_base + keys[None, :] + dk[:, None], mask=dk[:, None] < KEY_DIM, other=0.0)
            if SCALED:
                places = scales + first_scale + head * BLOCK_SIZE + block + token
                key_scale = power(tl.load(places, mask=seen, other=0))
                scores = tl.dot(q, k.to(q.dtype), input_precision=PRECISION) * (key_scale * scale)[None, :]
            else:
                scores = tl.dot(q, k, input_precision=PRECISION) * scale
            if HAS_CAP:
                scores = softcap * (2.0 / (1.0 + tl.exp(-2.0 * scores / softcap)) - 1.0)
            scores = tl.where(seen[None, :], scores * LOG2E, -1e30)
            weights, shrink, maximum = weigh(scores, seen[None, :], maximum, True)
            # masked, for what an unused slot holds may be NaN
            v = tl.load(
                value_base + values[:, None] + dv[None, :], mask=seen[:, None] & (dv[None, :] < VALUE_DIM), other=0.0
            )
            if SCALED:
                value_scale = power(tl.load(places + num_kv_heads * BLOCK_SIZE, mask=seen, other=0))
                v = (v.to(tl.float32) * value_scale[:, None]).to(q.dtype)
            acc = acc * shrink[:, None]
            acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
            total_sum = total_sum * shrink + tl.sum(weights, 1)

        is_whole = (tile == row_first) & (part_stop == row_stop)
        is_last = is_whole
        if not is_whole:
            mine = slot + (tile == row_first).to(tl.int32)  # a program begins at most one row that it does not finish
            tl.store(partial + (mine * GROUP_BLOCK + g[:, None]) * VALUE_BLOCK + dv[None, :], acc)
            tl.store(stats + mine * 2 * GROUP_BLOCK + g, maximum)
            tl.store(stats + (mine * 2 + 1) * GROUP_BLOCK + g, total_sum)
            tl.debug_barrier()  # the stores of all threads come before the arrival is told
            first_program = row_first // share
            last_program = (row_stop - 1) // share
            counter = arrived + row * num_kv_heads + head
            is_last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == last_program - first_program
            tl.debug_barrier()
            if is_last:
                tl.store(counter, 0)
                total_sum = tl.zeros([GROUP_BLOCK], tl.float32)
                maximum = tl.full([GROUP_BLOCK], -1e30, tl.float32)
                acc = tl.zeros([GROUP_BLOCK, VALUE_BLOCK], tl.float32)
                for other in range(first_program, last_program + 1):
                    at = (head * tl.num_programs(1) + other) * 2 + (other == first_program).to(tl.int32)
                    m = tl.load(stats + at * 2 * GROUP_BLOCK + g, cache_modifier=".cg")
                    s = tl.load(stats + (at * 2 + 1) * GROUP_BLOCK + g, cache_modifier=".cg")
                    a = tl.load(
                        partial + (at * GROUP_BLOCK + g[:, None]) * VALUE_BLOCK + dv[None, :], cache_modifier=".cg"
                    )
                    highest = tl.maximum(maximum, m)
                    shrink, grow = tl.exp2(maximum - highest), tl.exp2(m - highest)
                    acc = acc * shrink[:, None] + a * grow[:, None]
                    total_sum = total_sum * shrink + s * grow
                    maximum = highest
        if is_last:
            if HAS_SINKS:
                sink = tl.load(sinks + head * GROUP + g, mask=g < GROUP, other=0.0).to(tl.float32) * LOG2E
                acc, total_sum = with_sink(sink, acc, total_sum, maximum)
            result = acc / total_sum[:, None]
            at = (row.to(tl.int64) * num_kv_heads + head) * GROUP + g[:, None]
            tl.store(
                out + at * VALUE_DIM + dv[None, :],
                result.to(out.dtype.element_ty),
                mask=(g[:, None] < GROUP) & (dv[None, :] < VALUE_DIM),
            )
        tile = part_stop
        row += 1
