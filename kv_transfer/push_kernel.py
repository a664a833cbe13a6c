"""One kernel that moves scattered pages into another pool's scattered pages, re-laid out on the way, and digests them.

It takes addresses, not tensors: the target may be memory of another process or GPU. A bounded number of programs loops
over chunks of 16 KiB, so that few multiprocessors carry the copy and the others stay with the model. Three chunks of
each are on their way into shared memory while one is stored: with less in flight a program waits for latencies.

A chunk is a run of rows that lie together on both sides, where blocks are of one size, or rows that are each looked up.

Digest of a set of words w (32 bits; bytes where rows are no multiple), each at a column of the row (tile, token), the
same whatever the order, the block size and the program that saw them:

    sum of  w * K(column) * R(tile, token)   modulo 2^64,    K, R odd;    R = tile * A + token * B, made odd

A changed word changes it by (w - w') * odd, which is never 0, so any single damaged word is always seen; words or rows
exchanged, or left as they were, are seen but for a chance of about 2^-40. (Multilinear hashing: Lemire and Kaser,
"Strongly universal string hashing is fast", 2014. The keys are fixed: this finds damage, it is no signature.)
"""

import math
from dataclasses import dataclass

import triton
import triton.language as tl

from kv_transfer import triton_launch
from kv_transfer.relayout import TileRange

CHUNK_WORDS = 4096  # that a program moves at a time
STAGES = 4  # chunks in a program's hands
NUM_WARPS = 8


@dataclass(frozen=True, slots=True)
class Side:
    """One pool, as the kernel addresses it."""

    address: int  # of block 0; a multiple of 4
    block_bytes: int
    block_size: int
    pages: int  # address of int32 page ids
    first_block: int  # logical number of the block that pages[0] is


def launch(
    source: Side,
    target: Side | None,
    tokens: tuple[int, int],
    tiles: TileRange,
    digests: int,
    num_programs: int,
    guard: int = 0,
    generation: int = 0,
    target_tiles: TileRange | None = None,
    with_digest: bool = True,
) -> None:
    """Moves tokens [start, stop) of some tiles on the current stream: int64 `digests`[i] becomes program i's sum.

    `target` None: only digests. `guard`: address of a uint64; unless it holds `generation`, nothing is written.
    `target_tiles`: where as many tiles of equal rows lie in the target, if not where they lie in the source: a slice of
    the heads, say. The digest counts tiles as the target does.
    """
    other, theirs = target or source, target_tiles or tiles
    start, stop = tokens
    size = 4 if tiles.row_bytes % 4 == 0 else 1
    words = tiles.row_bytes // size
    columns = triton.next_power_of_2(words)
    mine_part, their_part = tiles.part_tiles or tiles.num_tiles, theirs.part_tiles or theirs.num_tiles
    # Rows that lie together where whole blocks of one size move; each chunk has whole tiles, or whole parts of one.
    run, even = their_part * other.block_size, other.block_size & -other.block_size
    run_rows = min(run & -run if even == other.block_size else even, CHUNK_WORDS // columns)
    is_whole = (
        source.block_size == other.block_size
        and start % source.block_size == stop % source.block_size == 0
        and mine_part == their_part
        and columns == words
        and run_rows * words >= CHUNK_WORDS // 8
    )
    rows = run_rows if is_whole else max(1, CHUNK_WORDS // columns)
    unit = unit_tokens(source.block_size, other.block_size, start, stop, rows)
    group = tiles.num_tiles * source.block_size // rows if is_whole else tiles.num_tiles
    num_rows = (stop - start) * tiles.num_tiles
    assert num_rows < 1 << 30, num_rows
    places = [
        (side.address, side.block_bytes, part.before * side.block_size, part.part_bytes * side.block_size)
        for side, part in ((source, tiles), (other, theirs))
    ]
    together = (rows if is_whole else 1) * tiles.row_bytes
    aligned = math.gcd(16, together, *(number for place in places for number in place))
    numbers = (
        source.address,
        other.address,
        source.pages,
        other.pages,
        digests,
        guard,
        generation,
        num_rows,
        start,
        unit.bit_length() - 1,
        group,
        *divider(group),
        theirs.first_tile,
        theirs.part_step,
        source.first_block,
        other.first_block,
        *(place[i] // size for i in (1, 2, 3) for place in places),
    )
    constants = dict(
        SOURCE_SIZE=source.block_size,
        TARGET_SIZE=other.block_size,
        SOURCE_TILES=mine_part,
        TARGET_TILES=their_part,
        WORD_BYTES=size,
        WORDS=words,
        COLUMNS=columns,
        ROWS=rows,
        WHOLE=is_whole,
        PUSH=target is not None,
        GUARDED=bool(guard),
        DIGEST=with_digest,
        ALIGNED=aligned,
        NUM_STAGES=STAGES,
    )
    triton_launch.run(move_kernel, num_programs, numbers, constants, NUM_WARPS)


def unit_tokens(source_size: int, target_size: int, start: int, stop: int, most: int) -> int:
    """Tokens that lie together on both sides: a power of two that divides block sizes and ends, and is at most `most`,
    a power of two."""
    common = math.gcd(source_size, target_size, start, stop)
    return min(common & -common, most)


def divider(divisor: int) -> tuple[int, int]:
    """Multiplier and shift with which `quotient` divides numbers below 2^30: GPUs have no instruction for it, and a
    program waited longer for its divisions than for its loads."""
    bits = (divisor - 1).bit_length()
    return -(-(1 << 30 + bits) // divisor), 30 + bits


# All 23 numbers, or a variant for each that is 1 or a multiple of 16 would be compiled in the middle of a transfer.
@triton.jit(do_not_specialize=list(range(23)))
def move_kernel(
    source,
    target,
    source_pages,
    target_pages,
    digests,
    guard,
    generation,
    num_rows,
    start,
    unit_bits,  # of the tokens that lie together, where rows are looked up
    group,  # chunks of a block; where rows are looked up, tiles
    group_by,  # its divider
    group_bits,
    first_tile,
    tile_step,
    source_first_block,
    target_first_block,
    source_block,  # from here on in words
    target_block,
    source_before,
    target_before,
    source_part,
    target_part,
    SOURCE_SIZE: tl.constexpr,
    TARGET_SIZE: tl.constexpr,
    SOURCE_TILES: tl.constexpr,  # of a part
    TARGET_TILES: tl.constexpr,
    WORD_BYTES: tl.constexpr,
    WORDS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
    PUSH: tl.constexpr,
    GUARDED: tl.constexpr,
    DIGEST: tl.constexpr,
    ALIGNED: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    WORD: tl.constexpr = tl.uint32 if WORD_BYTES == 4 else tl.uint8
    ALIGN: tl.constexpr = ALIGNED // WORD_BYTES
    # The cast of a number is not known to be aligned, and words would move one by one.
    source = tl.multiple_of(tl.cast(source, tl.pointer_type(WORD)), ALIGNED)
    target = tl.multiple_of(tl.cast(target, tl.pointer_type(WORD)), ALIGNED)
    source_pages = tl.cast(source_pages, tl.pointer_type(tl.int32))
    target_pages = tl.cast(target_pages, tl.pointer_type(tl.int32))
    if GUARDED:
        held = tl.load(tl.cast(guard, tl.pointer_type(tl.int64)), volatile=True)
        num_rows = tl.where(held == generation, num_rows, 0)
    line = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    seen = tl.zeros((ROWS, (COLUMNS + 3) // 4), tl.uint64)
    # What does not change from one chunk to the next, where the rows of each follow one another
    at = line[:, None] * WORDS + column
    line_weight = linear_weight(line // SOURCE_SIZE, line % SOURCE_SIZE)
    source_pages += tl.where(WHOLE, start // SOURCE_SIZE, 0) - source_first_block
    target_pages += tl.where(WHOLE, start // SOURCE_SIZE, 0) - target_first_block
    for chunk in tl.range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0), num_stages=NUM_STAGES):
        if WHOLE:
            block = quotient(chunk, group_by, group_bits)
            row = (chunk - block * group) * ROWS  # of those of the block that move
            part, row = row // (SOURCE_TILES * SOURCE_SIZE), row % (SOURCE_TILES * SOURCE_SIZE)
            page = tl.load(source_pages + block).to(tl.int64)
            from_row = page * source_block + (source_before + part * source_part + row * WORDS)
            words = tl.load(source + (tl.multiple_of(from_row, ALIGN) + at))
            if PUSH:
                page = tl.load(target_pages + block).to(tl.int64)
                to_row = page * target_block + (target_before + part * target_part + row * WORDS)
                tl.store(target + (tl.multiple_of(to_row, ALIGN) + at), words)
            if DIGEST:
                tile = first_tile + part * tile_step + row // SOURCE_SIZE
                weight = linear_weight(tile, start + block * SOURCE_SIZE + row % SOURCE_SIZE)
                seen += digest(words, weight + line_weight, ROWS, COLUMNS)
        else:
            row = chunk * ROWS + line
            live = row < num_rows
            unit = row >> unit_bits
            units = quotient(unit, group_by, group_bits)
            tile, token = unit - units * group, start + (units << unit_bits) + (row & ((1 << unit_bits) - 1))
            inside = live[:, None] & (column < WORDS)
            from_row = place(
                *(tile, token, live, source_pages, source_block, source_before, source_part),
                *(SOURCE_TILES, SOURCE_SIZE, WORDS, ALIGN),
            )
            words = tl.load(source + (from_row[:, None] + column), mask=inside, other=0)
            if PUSH:
                to_row = place(
                    *(tile, token, live, target_pages, target_block, target_before, target_part),
                    *(TARGET_TILES, TARGET_SIZE, WORDS, ALIGN),
                )
                tl.store(target + (to_row[:, None] + column), words, mask=inside)
            if DIGEST:
                number = first_tile + tile // TARGET_TILES * tile_step + tile % TARGET_TILES
                seen += digest(words, linear_weight(number, token), ROWS, COLUMNS)
    digests = tl.cast(digests, tl.pointer_type(tl.int64))
    tl.store(digests + tl.program_id(0), tl.sum(tl.sum(seen, axis=1), axis=0).to(tl.int64, bitcast=True))


@triton.jit
def quotient(number, by, bits):
    """Of numbers in [0, 2^30) and a divisor whose `divider` this is."""
    return ((tl.cast(number, tl.int64) * by) >> bits).to(tl.int32)


@triton.jit
def place(
    tile,
    token,
    live,
    pages,
    block,
    before,
    part,
    PART_TILES: tl.constexpr,
    SIZE: tl.constexpr,
    WORDS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Where rows begin in a pool, in words. `tile` counts those that move; rows that are not `live` lie anywhere.
    `pages`: those of the logical blocks from 0 on."""
    page = tl.load(pages + token // SIZE, mask=live, other=0).to(tl.int64)
    row = tile % PART_TILES * SIZE + token % SIZE
    return tl.multiple_of(page * block + (before + tile // PART_TILES * part + row * WORDS), ALIGN)


@triton.jit
def linear_weight(tile, token):
    """Of a row, before it is made odd: the weight of a sum of tiles and tokens is the sum of theirs."""
    return tl.cast(tile, tl.uint64) * 0xBF58476D1CE4E5B9 + tl.cast(token, tl.uint64) * 0x94D049BB133111EB


@triton.jit
def digest(words, weight, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """What each four words of a row [ROWS, COLUMNS] add to the sum: they, by their keys, then once by the row's."""
    columns = tl.arange(0, COLUMNS)
    # The upper half of splitmix64's first step, so that word times key is one wide multiplication.
    keys = (((columns.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15) >> 32) | 1
    products = words.to(tl.uint64) * keys[None, :]
    if COLUMNS >= 4:
        products = tl.sum(tl.reshape(products, (ROWS, COLUMNS // 4, 4)), axis=2)
    elif COLUMNS > 1:
        products = tl.sum(products, axis=1)[:, None]
    return products * (weight | 1)[:, None]
