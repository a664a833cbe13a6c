"""One kernel that moves scattered pages into another pool's scattered pages, re-laid out on the way, and digests them.

It takes addresses, not tensors: the target may be memory of another process or GPU. A work item is one tile's run of
rows that is contiguous on both sides; a bounded number of programs loops over all items, so that few multiprocessors
carry the copy (NVLink takes what 16 or so of them write) and the others stay with the model.

Digest of a set of 32-bit words w, each at a column of the row (tile, token), the same whatever the order, the block
size and the program that saw them:

    sum of  w * K(column) * R(tile, token)   modulo 2^64,    K, R odd;    R = tile * A + token * B, made odd

A changed word changes it by (w - w') * odd, which is never 0, so any single damaged word is always seen; words or rows
exchanged, or left as they were, are seen but for a chance of about 2^-40. (Multilinear hashing: Lemire and Kaser,
"Strongly universal string hashing is fast", 2014. The keys are fixed: this finds damage, it is no signature.)
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kv_transfer.relayout import TileRange

TILE_WORDS = 4096  # of 32 bits, that a program moves at a time


@dataclass(frozen=True, slots=True)
class Side:
    """One pool, as the kernel addresses it."""

    address: int  # of block 0; a multiple of 4
    block_bytes: int
    block_size: int
    pages: int  # address of int32 page ids
    first_block: int  # logical number of the block that pages[0] is


@dataclass(frozen=True, slots=True)
class Heads:
    """Which of a pool's kv heads move: `num` of `total`, from `first` on."""

    total: int
    first: int
    num: int


def unit_tokens(source_size: int, target_size: int, row_bytes: int, start: int = 0, stop: int = 0) -> int:
    """Tokens per work item: a power of two that divides both block sizes and the ends of what moves."""
    common = math.gcd(source_size, target_size, start, stop)
    return min(common & -common, max(1, TILE_WORDS // triton.next_power_of_2(row_bytes // 4)))


def launch(
    source: Side,
    target: Side | None,
    tokens: tuple[int, int],
    tiles: TileRange,
    digests: int,
    num_programs: int,
    guard: int = 0,
    generation: int = 0,
    source_heads: Heads | None = None,
    target_heads: Heads | None = None,
    with_digest: bool = True,
    num_warps: int = 8,
    tile_words: int = TILE_WORDS,
) -> None:
    """Moves tokens [start, stop) of some tiles on the current stream: int64 `digests`[i] becomes program i's sum.

    `target` None: only digests. `guard`: address of a uint64; unless it holds `generation`, nothing is written.
    With heads, `num_tiles` counts those that move: a multiple of `num`, in parts (K, V of each layer) of `total` tiles.
    """
    num_tiles, row_bytes, before = tiles.num_tiles, tiles.row_bytes, tiles.before
    other = target or source
    start, stop = tokens
    assert row_bytes % 4 == 0, row_bytes
    unit = unit_tokens(source.block_size, other.block_size, row_bytes, start, stop)
    num_units = (stop - start) // unit
    mine = source_heads or Heads(num_tiles or 1, 0, num_tiles or 1)
    theirs = target_heads or Heads(mine.num, 0, mine.num)
    words, columns = row_bytes // 4, triton.next_power_of_2(row_bytes // 4)
    units = max(1, tile_words // (unit * columns))
    is_aligned = row_bytes % 16 == 0 and all(
        number % 16 == 0
        for side in (source, other)
        for number in (side.address, side.block_bytes, before * side.block_size)
    )
    move_kernel[(num_programs,)](
        source.address,
        other.address,
        source.pages,
        other.pages,
        digests,
        guard,
        generation,
        num_units * num_tiles,
        num_tiles,
        tiles.first_tile,
        start,
        source.first_block,
        other.first_block,
        source.block_bytes // 4,
        other.block_bytes // 4,
        before // 4 * source.block_size,
        before // 4 * other.block_size,
        mine.total,
        mine.first,
        mine.num,
        theirs.total,
        theirs.first,
        SOURCE_SIZE=source.block_size,
        TARGET_SIZE=other.block_size,
        UNIT=unit,
        UNITS=units,
        WORDS=words,
        COLUMNS=columns,
        PUSH=target is not None,
        GUARDED=bool(guard),
        DIGEST=with_digest,
        ALIGNED=is_aligned,
        num_warps=num_warps,
    )


def total(digests: torch.Tensor) -> int:
    """The digest of what one launch moved: its programs' sums, modulo 2^64."""
    return int(digests.numpy().sum()) % 2**64  # int64 wraps around


# Numbers of a launch that say nothing about alignment. Else a variant for each that is 1, or a multiple of 16, would be
# compiled in the middle of a transfer.
_PLAIN = [
    "guard",
    "generation",
    "num_items",
    "num_tiles",
    "first_tile",
    "start",
    "source_first_block",
    "target_first_block",
    "source_total",
    "source_first_head",
    "num_heads",
    "target_total",
    "target_first_head",
]


@triton.jit(do_not_specialize=_PLAIN)
def move_kernel(
    source,
    target,
    source_pages,
    target_pages,
    digests,
    guard,
    generation,
    num_items,
    num_tiles,
    first_tile,
    start,
    source_first_block,
    target_first_block,
    source_block_words,
    target_block_words,
    source_before,
    target_before,
    source_total,
    source_first_head,
    num_heads,
    target_total,
    target_first_head,
    SOURCE_SIZE: tl.constexpr,
    TARGET_SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    UNITS: tl.constexpr,
    WORDS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PUSH: tl.constexpr,
    GUARDED: tl.constexpr,
    DIGEST: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    source = tl.cast(source, tl.pointer_type(tl.int32))
    target = tl.cast(target, tl.pointer_type(tl.int32))
    if ALIGNED:  # to 16 bytes, as is every row; a cast forgets it, and then words would move one by one
        source, target = tl.multiple_of(source, 16), tl.multiple_of(target, 16)
    source_pages = tl.cast(source_pages, tl.pointer_type(tl.int32))
    target_pages = tl.cast(target_pages, tl.pointer_type(tl.int32))
    digests = tl.cast(digests, tl.pointer_type(tl.int64))
    if GUARDED:
        held = tl.load(tl.cast(guard, tl.pointer_type(tl.int64)), volatile=True)
        num_items = tl.where(held == generation, num_items, 0)
    columns = tl.arange(0, COLUMNS)
    # The upper half of splitmix64's first step, so that word times key is one wide multiplication.
    keys = (((columns.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15) >> 32) | 1
    row = tl.arange(0, UNITS * UNIT)  # the rows of UNITS items go together
    stride = tl.num_programs(0) * UNITS
    item = tl.program_id(0) * UNITS + row // UNIT
    first = tl.program_id(0) * UNITS
    seen = tl.zeros((UNITS * UNIT, COLUMNS), tl.uint64)
    places = _places(
        item,
        num_items,
        num_tiles,
        start,
        row,
        source_pages,
        source_first_block,
        source_block_words,
        source_before,
        source_total,
        source_first_head,
        num_heads,
        SOURCE_SIZE,
        UNIT,
        WORDS,
    )
    inside = (item < num_items)[:, None] & (columns < WORDS)[None, :]
    words = tl.load(source + places[:, None] + columns[None, :], mask=inside, other=0)
    while first < num_items:
        # The next rows are on their way while these are written and digested: a program keeps a multiprocessor busy.
        following = item + stride
        places = _places(
            following,
            num_items,
            num_tiles,
            start,
            row,
            source_pages,
            source_first_block,
            source_block_words,
            source_before,
            source_total,
            source_first_head,
            num_heads,
            SOURCE_SIZE,
            UNIT,
            WORDS,
        )
        ahead = (following < num_items)[:, None] & (columns < WORDS)[None, :]
        next_words = tl.load(source + places[:, None] + columns[None, :], mask=ahead, other=0)
        if PUSH:
            places = _places(
                item,
                num_items,
                num_tiles,
                start,
                row,
                target_pages,
                target_first_block,
                target_block_words,
                target_before,
                target_total,
                target_first_head,
                num_heads,
                TARGET_SIZE,
                UNIT,
                WORDS,
            )
            tl.store(target + places[:, None] + columns[None, :], words, mask=inside)
        if DIGEST:
            tile, token = first_tile + item % num_tiles, start + item // num_tiles * UNIT + row % UNIT
            weight = (tile.to(tl.uint64) * 0xBF58476D1CE4E5B9 + token.to(tl.uint64) * 0x94D049BB133111EB) | 1
            seen += words.to(tl.uint32, bitcast=True).to(tl.uint64) * keys[None, :] * weight[:, None]
        words, inside, item = next_words, ahead, following
        first += stride
    tl.store(digests + tl.program_id(0), tl.sum(tl.sum(seen, axis=1), axis=0).to(tl.int64, bitcast=True))


@triton.jit
def _places(
    item,
    num_items,
    num_tiles,
    start,
    row,
    pages,
    first_block,
    block_words,
    before,
    total,
    first_head,
    num_heads,
    SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Where the items' rows begin in a pool, in words; 0 behind the last item."""
    tile, token = item % num_tiles, start + item // num_tiles * UNIT + row % UNIT
    page = tl.load(pages + (token // SIZE - first_block), mask=item < num_items, other=0).to(tl.int64)
    offset = before + (tile // num_heads * total + first_head + tile % num_heads) * (SIZE * WORDS)
    return page * block_words + offset + token % SIZE * WORDS
