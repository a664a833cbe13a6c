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
    run = their_part * other.block_size  # rows that lie together where whole blocks of one size move
    run_rows = min(run & -run, CHUNK_WORDS // columns)
    is_whole = (
        source.block_size == other.block_size
        and start % source.block_size == stop % source.block_size == 0
        and mine_part == their_part
        and columns == words
        and run_rows * words >= CHUNK_WORDS // 8
    )
    rows = run_rows if is_whole else max(1, CHUNK_WORDS // columns)
    unit = source.block_size if is_whole else unit_tokens(source.block_size, other.block_size, start, stop, rows)
    num_rows = (stop - start) * tiles.num_tiles
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
        tiles.num_tiles,
        start,
        unit,
        theirs.first_tile,
        theirs.part_step,
        source.first_block,
        other.first_block,
        *(place[i] // size for i in (1, 2, 3) for place in places),
        mine_part,
        their_part,
    )
    constants = dict(
        SOURCE_SIZE=source.block_size,
        TARGET_SIZE=other.block_size,
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
    num_tiles,
    start,
    unit,
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
    source_part_tiles,
    target_part_tiles,
    SOURCE_SIZE: tl.constexpr,
    TARGET_SIZE: tl.constexpr,
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
    if GUARDED:
        held = tl.load(tl.cast(guard, tl.pointer_type(tl.int64)), volatile=True)
        num_rows = tl.where(held == generation, num_rows, 0)
    line = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    seen = tl.zeros((ROWS, (COLUMNS + 3) // 4), tl.uint64)
    for chunk in tl.range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0), num_stages=NUM_STAGES):
        row = chunk * ROWS if WHOLE else chunk * ROWS + line
        live = row < num_rows
        tile, token = row // unit % num_tiles, start + row // unit // num_tiles * unit + row % unit
        from_row = place(
            *(tile, token, live, source_pages, source_first_block, source_block, source_before, source_part),
            *(source_part_tiles, SOURCE_SIZE, WORDS, ALIGN),
        )
        to_row = place(
            *(tile, token, live, target_pages, target_first_block, target_block, target_before, target_part),
            *(target_part_tiles, TARGET_SIZE, WORDS, ALIGN),
        )
        if WHOLE:  # the others follow the first, in the same page and part
            inside = column < WORDS
            from_row, to_row = from_row + line * WORDS, to_row + line * WORDS
            in_tile = token % SOURCE_SIZE + line
            tile, token = tile + in_tile // SOURCE_SIZE, token // SOURCE_SIZE * SOURCE_SIZE + in_tile % SOURCE_SIZE
        else:
            inside = live[:, None] & (column < WORDS)
        words = tl.load(source + (from_row[:, None] + column), mask=inside, other=0)
        if PUSH:
            tl.store(target + (to_row[:, None] + column), words, mask=inside)
        if DIGEST:
            number = first_tile + tile // target_part_tiles * tile_step + tile % target_part_tiles
            seen += digest(words, number, token, ROWS, COLUMNS)
    digests = tl.cast(digests, tl.pointer_type(tl.int64))
    tl.store(digests + tl.program_id(0), tl.sum(tl.sum(seen, axis=1), axis=0).to(tl.int64, bitcast=True))


@triton.jit
def place(
    tile,
    token,
    live,
    pages,
    first_block,
    block,
    before,
    part,
    part_tiles,
    SIZE: tl.constexpr,
    WORDS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Where rows begin in a pool, in words. `tile` counts those that move; rows that are not `live` lie anywhere."""
    pages = tl.cast(pages, tl.pointer_type(tl.int32))
    page = tl.load(pages + (token // SIZE - first_block), mask=live, other=0).to(tl.int64)
    row = tile % part_tiles * SIZE + token % SIZE
    return tl.multiple_of(page * block + (before + tile // part_tiles * part + row * WORDS), ALIGN)


@triton.jit
def digest(words, tile, token, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """What each four words of a row [ROWS, COLUMNS] add to the sum: they, by their keys, then once by the row's."""
    columns = tl.arange(0, COLUMNS)
    # The upper half of splitmix64's first step, so that word times key is one wide multiplication.
    keys = (((columns.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15) >> 32) | 1
    weight = (tile.to(tl.uint64) * 0xBF58476D1CE4E5B9 + token.to(tl.uint64) * 0x94D049BB133111EB) | 1
    products = words.to(tl.uint64) * keys[None, :]
    if COLUMNS >= 4:
        products = tl.sum(tl.reshape(products, (ROWS, COLUMNS // 4, 4)), axis=2)
    elif COLUMNS > 1:
        products = tl.sum(products, axis=1)[:, None]
    return products * weight[:, None]
