"""The push kernel for a receiver that keeps its KV in float8: rows are rounded as they move (kv_transfer/rounding.py).

    source row of a tile  ──►  row of e4m3 in a value tile, and its scale, a row of one byte in a scale tile

What it digests is what it writes, in the receiver's tiles: the sum that push_kernel finds there.
"""

import math

import torch
import triton
import triton.language as tl

from kv_transfer import triton_launch
from kv_transfer.push_kernel import (
    CHUNK_WORDS,
    NUM_WARPS,
    Side,
    digest,
    divider,
    linear_weight,
    place,
    quotient,
    unit_tokens,
)
from kv_transfer.relayout import TileRange

# A program has fewer tiles at a time: between load and store there is work in registers.
ELEMENTS, STAGES = 2 * CHUNK_WORDS, 3
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def launch(
    source: Side,
    target: Side,
    tokens: tuple[int, int],
    tiles: tuple[TileRange, TileRange, TileRange],
    digests: int,
    num_programs: int,
    guard: int = 0,
    generation: int = 0,
    *,
    dtype: torch.dtype,
) -> None:
    """As push_kernel's. `tiles`: rows of `dtype` in the source, their values and their scales in the target."""
    rows, values, scales = tiles
    start, stop = tokens
    dim = values.row_bytes
    word = 4 if dim % 4 == 0 else 1
    columns = triton.next_power_of_2(dim)
    num_rows = max(1, ELEMENTS // columns)
    sizes = (dtype.itemsize, word, 1)
    sides = (source, target, target)
    places = [
        (part.before * side.block_size, part.part_bytes * side.block_size, side.block_bytes)
        for side, part in zip(sides, tiles, strict=True)
    ]
    addresses = [source.address, target.address, rows.row_bytes, dim]
    aligned = math.gcd(16, *addresses, *(number for place in places[:2] for number in place))
    numbers = (
        source.address,
        target.address,
        source.pages,
        target.pages,
        digests,
        guard,
        generation,
        (stop - start) * values.num_tiles,
        start,
        unit_tokens(source.block_size, target.block_size, start, stop, num_rows).bit_length() - 1,
        values.num_tiles,
        *divider(values.num_tiles),
        source.first_block,
        target.first_block,
        *(number // size for at, size in zip(places, sizes, strict=True) for number in at),
        values.first_tile,
        scales.first_tile,
        values.part_step,
    )
    constants = dict(
        SOURCE_SIZE=source.block_size,
        TARGET_SIZE=target.block_size,
        SOURCE_TILES=rows.part_tiles or rows.num_tiles,
        TARGET_TILES=values.part_tiles,
        DTYPE=DTYPES[dtype],
        DIM=dim,
        COLUMNS=columns,
        ROWS=num_rows,
        WORD_BYTES=word,
        SOURCE_ALIGN=max(1, aligned // dtype.itemsize),
        TARGET_ALIGN=max(1, math.gcd(aligned, 16) // word),
        ALIGNED=aligned,
        GUARDED=bool(guard),
        NUM_STAGES=STAGES,
    )
    triton_launch.run(round_kernel, num_programs, numbers, constants, NUM_WARPS)


# All 27 numbers, or a variant for each that is 1 or a multiple of 16 would be compiled in the middle of a transfer.
@triton.jit(do_not_specialize=list(range(27)))
def round_kernel(
    source,
    target,
    source_pages,
    target_pages,
    digests,
    guard,
    generation,
    num_rows,
    start,
    unit_bits,
    num_tiles,
    tiles_by,
    tiles_bits,
    source_first_block,
    target_first_block,
    source_before,  # the next three in elements of the source
    source_part,
    source_block,
    value_before,  # in words of the target
    value_part,
    value_block,
    scale_before,  # in bytes
    scale_part,
    scale_block,
    first_value,
    first_scale,
    tile_step,
    SOURCE_SIZE: tl.constexpr,
    TARGET_SIZE: tl.constexpr,
    SOURCE_TILES: tl.constexpr,
    TARGET_TILES: tl.constexpr,
    DTYPE: tl.constexpr,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    WORD_BYTES: tl.constexpr,
    SOURCE_ALIGN: tl.constexpr,
    TARGET_ALIGN: tl.constexpr,
    ALIGNED: tl.constexpr,
    GUARDED: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    if DTYPE == "float32":
        source = tl.cast(source, tl.pointer_type(tl.float32))
    elif DTYPE == "float16":
        source = tl.cast(source, tl.pointer_type(tl.float16))
    else:  # the upper half of a float32
        source = tl.cast(source, tl.pointer_type(tl.int16))
    source = tl.multiple_of(source, ALIGNED)
    WORD: tl.constexpr = tl.uint32 if WORD_BYTES == 4 else tl.uint8
    WORDS: tl.constexpr = COLUMNS // WORD_BYTES
    values = tl.multiple_of(tl.cast(target, tl.pointer_type(WORD)), ALIGNED)
    scales = tl.cast(target, tl.pointer_type(tl.uint8))
    if GUARDED:
        held = tl.load(tl.cast(guard, tl.pointer_type(tl.int64)), volatile=True)
        num_rows = tl.where(held == generation, num_rows, 0)
    source_pages = tl.cast(source_pages, tl.pointer_type(tl.int32)) - source_first_block
    target_pages = tl.cast(target_pages, tl.pointer_type(tl.int32)) - target_first_block
    line = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    word = tl.arange(0, WORDS)[None, :]
    seen = tl.zeros((ROWS, (WORDS + 3) // 4), tl.uint64)
    seen_scales = tl.zeros((ROWS, 1), tl.uint64)
    for chunk in tl.range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0), num_stages=NUM_STAGES):
        row = chunk * ROWS + line
        live = row < num_rows
        unit = row >> unit_bits
        units = quotient(unit, tiles_by, tiles_bits)
        tile, token = unit - units * num_tiles, start + (units << unit_bits) + (row & ((1 << unit_bits) - 1))
        from_row = place(
            *(tile, token, live, source_pages, source_block, source_before, source_part),
            *(SOURCE_TILES, SOURCE_SIZE, DIM, SOURCE_ALIGN),
        )
        value_row = place(
            *(tile, token, live, target_pages, value_block, value_before, value_part),
            *(TARGET_TILES, TARGET_SIZE, DIM // WORD_BYTES, TARGET_ALIGN),
        )
        scale_row = place(
            *(tile, token, live, target_pages, scale_block, scale_before, scale_part),
            *(TARGET_TILES, TARGET_SIZE, 1, 1),
        )
        x = tl.load(source + (from_row[:, None] + column), mask=live[:, None] & (column < DIM), other=0)
        x = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True) if DTYPE == "bfloat16" else x.to(tl.float32)
        scale = row_scale(tl.max(tl.abs(x), 1))
        words = quantise(x, scale[:, None])
        if WORD_BYTES == 4:
            parts = tl.reshape(words.to(tl.uint32), (ROWS, WORDS, 4))
            words = tl.sum(parts << (tl.arange(0, 4) * 8).to(tl.uint32)[None, None, :], axis=2)
        scale = tl.where(live, scale, 0).to(tl.uint8)
        tl.store(values + (value_row[:, None] + word), words, mask=live[:, None] & (word < DIM // WORD_BYTES))
        tl.store(scales + scale_row, scale, mask=live)
        number = tile // TARGET_TILES * tile_step + tile % TARGET_TILES
        seen += digest(words, linear_weight(first_value + number, token), ROWS, WORDS)
        seen_scales += digest(scale[:, None], linear_weight(first_scale + number, token), ROWS, 1)
    digests = tl.cast(digests, tl.pointer_type(tl.int64))
    both = tl.sum(tl.sum(seen, axis=1), axis=0) + tl.sum(tl.sum(seen_scales, axis=1), axis=0)
    tl.store(digests + tl.program_id(0), both.to(tl.int64, bitcast=True))


@triton.jit
def row_scale(largest):
    """int32: the scale of rows whose largest absolute values, float32, these are."""
    bits = largest.to(tl.int32, bitcast=True)
    return tl.minimum(tl.maximum(((bits + 0x1FFFFF) >> 23) - 8, 1), 253)


@triton.jit
def quantise(x, scale):
    """uint8: e4m3 of float32 `x` over 2 ** (scale - 127), to nearest, ties to even; `scale` is int32 and broadcasts.
    In integers, since a conversion in Triton's interpreter rounds in its own way."""
    x = x * ((254 - scale) << 23).to(tl.float32, bitcast=True)
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)  # 3 bits of 23, exponent bias 7 of 127
    # 2 ** 14 is so large that what is added to it is rounded to a multiple of 2 ** -9, the smallest e4m3
    small = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0x3C800000, small, tl.minimum(normal, 0x7E))  # below 2 ** -6; not above 448
    return (tl.where(size > 0x7F800000, 0x7F, code) | ((bits >> 24) & 0x80)).to(tl.uint8)
