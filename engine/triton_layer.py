"""The small kernels between a decoder layer's matrix products, each one pass over memory. References are in ops.py.

All compute in float32 and round once, where the original modules round after every operation.
"""

import triton
import triton.language as tl

from engine.triton_fp8 import power, quantise, row_scale


@triton.jit
def add_norm_kernel(
    x,  # [num_rows, width]
    residual,  # [num_rows, width], updated in place when ADD
    before,  # weight of the norm on x before the addition, when BEFORE
    weight,
    out,  # [num_rows, width]
    width,
    eps,
    OFFSET: tl.constexpr,  # added to the weights: Gemma stores them around zero
    ADD: tl.constexpr,
    BEFORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    at = row * width + column
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if BEFORE:
        w = tl.load(before + column, mask=inside, other=0.0).to(tl.float32) + OFFSET
        value = value * (1.0 / tl.sqrt(tl.sum(value * value, 0) / width + eps)) * w
    if ADD:
        value += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(residual.dtype.element_ty)
        tl.store(residual + at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + OFFSET
    value = value * (1.0 / tl.sqrt(tl.sum(value * value, 0) / width + eps)) * w
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gated_kernel(
    gate_up,  # [num_rows, 2 * width]: gate, then up; the answer takes the place of gate
    width,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        gate = gate / (1.0 + tl.exp(-gate))
    elif ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        gate = gate / (1.0 + tl.exp(-2.0 * inner))  # 0.5 * (1 + tanh(z)) is the logistic function of 2 z
    else:
        gate = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(gate_up + row * 2 * width + column, (gate * up).to(gate_up.dtype.element_ty), mask=inside)


@triton.jit
def rope_write_kernel(
    qkv,  # [num_tokens, (num_heads + 2 * num_kv_heads) * dim], rotated in place
    cos,  # [num_tokens, dim]
    sin,
    q_weight,  # [dim], of the norm on each query head, when NORM
    k_weight,
    cache,  # the slab, as elements
    scales,  # the slab, as bytes
    slots,  # int32 [num_tokens]: block * block_size + offset; below zero: not written
    first,  # of this layer's K inside a block, in elements
    first_scale,  # of this layer's scales, in bytes
    block_stride,  # elements per block
    eps,
    num_heads,
    num_kv_heads,
    OFFSET: tl.constexpr,
    NORM: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,  # power of two >= dim / 2
    HEADS: tl.constexpr,  # per program; divides both head counts
    BLOCK_SIZE: tl.constexpr,
    SCALED: tl.constexpr,  # the cache is float8
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS
    heads = head + tl.arange(0, HEADS)
    d = tl.arange(0, HALF)
    half = DIM // 2
    inside = (heads[:, None] >= 0) & (d[None, :] < half)
    at = token * (num_heads + 2 * num_kv_heads) * DIM + heads[:, None] * DIM + d[None, :]
    low = tl.load(qkv + at, mask=inside, other=0.0)
    high = tl.load(qkv + at + half, mask=inside, other=0.0)
    if head < num_heads + num_kv_heads:
        a, b = low.to(tl.float32), high.to(tl.float32)
        if NORM:
            weight = q_weight
            if head >= num_heads:
                weight = k_weight
            scale = 1.0 / tl.sqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / DIM + eps)
            w = tl.load(weight + d, mask=d < half, other=0.0).to(tl.float32) + OFFSET
            a = a * scale[:, None] * w[None, :]
            w = tl.load(weight + half + d, mask=d < half, other=0.0).to(tl.float32) + OFFSET
            b = b * scale[:, None] * w[None, :]
        c = tl.load(cos + token * DIM + d, mask=d < half, other=0.0).to(tl.float32)[None, :]
        s = tl.load(sin + token * DIM + d, mask=d < half, other=0.0).to(tl.float32)[None, :]
        low = (a * c - b * s).to(low.dtype)
        c = tl.load(cos + token * DIM + half + d, mask=d < half, other=0.0).to(tl.float32)[None, :]
        s = tl.load(sin + token * DIM + half + d, mask=d < half, other=0.0).to(tl.float32)[None, :]
        high = (b * c + a * s).to(high.dtype)
        tl.store(qkv + at, low, mask=inside)
        tl.store(qkv + at + half, high, mask=inside)
    slot = tl.load(slots + token).to(tl.int64)
    if (head >= num_heads) & (slot >= 0):
        # K of all heads, then V of all heads: one run of 2 * num_kv_heads tiles
        target = (slot // BLOCK_SIZE) * block_stride + first + (slot % BLOCK_SIZE) * DIM
        target += (heads[:, None] - num_heads) * (BLOCK_SIZE * DIM) + d[None, :]
        if SCALED:
            x, y = low.to(tl.float32), high.to(tl.float32)
            row = row_scale(tl.maximum(tl.max(tl.abs(x), 1), tl.max(tl.abs(y), 1)))
            place = (slot // BLOCK_SIZE) * block_stride + first_scale + slot % BLOCK_SIZE
            tl.store(scales + place + (heads - num_heads) * BLOCK_SIZE, row.to(tl.uint8))
            tl.store(cache + target, quantise(x, row[:, None]), mask=inside)
            tl.store(cache + target + half, quantise(y, row[:, None]), mask=inside)
        else:
            tl.store(cache + target, low, mask=inside)
            tl.store(cache + target + half, high, mask=inside)


@triton.jit
def write_kernel(
    key,  # [num_tokens, num_kv_heads, key_dim], any strides but the last
    value,  # [num_tokens, num_kv_heads, value_dim]
    cache,
    scales,
    slots,
    first,
    first_scale,
    block_stride,
    key_token,
    key_head,
    value_token,
    value_head,
    num_kv_heads,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SCALED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    slot = tl.load(slots + token).to(tl.int64)
    if slot >= 0:
        base = (slot // BLOCK_SIZE) * block_stride + first
        offset = slot % BLOCK_SIZE
        d = tl.arange(0, KEY_BLOCK)
        k = tl.load(key + token * key_token + head * key_head + d, mask=d < KEY_DIM, other=0.0)
        place = scales + (slot // BLOCK_SIZE) * block_stride + first_scale + head * BLOCK_SIZE + offset
        if SCALED:
            k = k.to(tl.float32)
            scale = row_scale(tl.max(tl.abs(k), 0))
            tl.store(place, scale.to(tl.uint8))
            k = quantise(k, scale)
        tl.store(cache + base + (head * BLOCK_SIZE + offset) * KEY_DIM + d, k, mask=d < KEY_DIM)
        d = tl.arange(0, VALUE_BLOCK)
        v = tl.load(value + token * value_token + head * value_head + d, mask=d < VALUE_DIM, other=0.0)
        if SCALED:
            v = v.to(tl.float32)
            scale = row_scale(tl.max(tl.abs(v), 0))
            tl.store(place + num_kv_heads * BLOCK_SIZE, scale.to(tl.uint8))
            v = quantise(v, scale)
        base += num_kv_heads * BLOCK_SIZE * KEY_DIM
        tl.store(cache + base + (head * BLOCK_SIZE + offset) * VALUE_DIM + d, v, mask=d < VALUE_DIM)


@triton.jit(do_not_specialize_on_alignment=["table"])  # a row's table begins anywhere
def gather_kernel(
    cache,  # the slab, as elements
    scales,  # the slab, as bytes
    table,  # int32 [num_blocks]
    out,  # [num_tiles, num_blocks, TILE]
    first,  # of this layer's K inside a block, in elements
    first_scale,  # of this layer's scales, in bytes
    block_stride,
    TILE: tl.constexpr,  # elements of one head's K or V in a block
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALED: tl.constexpr,  # the cache is float8
):
    block = tl.load(table + tl.program_id(0)).to(tl.int64)
    source = cache + block * block_stride + first + tl.program_id(1) * TILE
    target = out + (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * TILE
    for start in tl.static_range(0, TILE, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(source + i, mask=i < TILE)
        if SCALED:
            row = block * block_stride + first_scale + tl.program_id(1) * (TILE // DIM) + i // DIM
            x = (x.to(tl.float32) * power(tl.load(scales + row, mask=i < TILE))).to(out.dtype.element_ty)
        tl.store(target + i, x, mask=i < TILE)


@triton.jit
def merge_kernel(
    out,  # [num_rows, num_heads, dim], updated in place
    lse,  # float32 [num_heads, >= num_rows], updated in place
    other,  # [num_rows, num_heads, dim]: the same queries' attention to other keys
    other_lse,
    out_row,
    other_row,
    lse_head,
    other_lse_head,
    num_heads,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,  # per program
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, BLOCK)
    exists = head < num_heads
    inside = exists[:, None] & (d[None, :] < DIM)
    a = tl.load(lse + head * lse_head + row, mask=exists, other=0.0)
    b = tl.load(other_lse + head * other_lse_head + row, mask=exists, other=0.0)
    highest = tl.maximum(a, b)
    wa, wb = tl.exp(a - highest), tl.exp(b - highest)
    x = tl.load(out + row * out_row + head[:, None] * DIM + d[None, :], mask=inside, other=0.0).to(tl.float32)
    y = tl.load(other + row * other_row + head[:, None] * DIM + d[None, :], mask=inside, other=0.0).to(tl.float32)
    merged = (x * wa[:, None] + y * wb[:, None]) / (wa + wb)[:, None]
    tl.store(out + row * out_row + head[:, None] * DIM + d[None, :], merged.to(out.dtype.element_ty), mask=inside)
    tl.store(lse + head * lse_head + row, highest + tl.log(wa + wb), mask=exists)


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def prepare_kernel(
    ids,  # int32 [num_tokens]
    sources,  # int32 [num_tokens]: whose token of the step before this is, -1: `ids` has it
    positions,  # int32 [num_tokens]
    last,  # int32 [num_rows]
    tokens,  # int64, of the step before by row
    out_ids,  # int64 [num_tokens]
    out_positions,
    out_last,  # int64 [num_rows]
    num_tokens,
    num_rows,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < num_tokens
    source = tl.load(sources + i, mask=inside, other=-1)
    known = tl.load(ids + i, mask=inside, other=0).to(tl.int64)
    late = tl.load(tokens + source, mask=source >= 0, other=0)
    tl.store(out_ids + i, tl.where(source >= 0, tl.maximum(late, 0), known), mask=inside)
    tl.store(out_positions + i, tl.load(positions + i, mask=inside, other=0).to(tl.int64), mask=inside)
    tl.store(out_last + i, tl.load(last + i, mask=i < num_rows, other=0).to(tl.int64), mask=i < num_rows)
