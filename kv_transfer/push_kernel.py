"""One kernel that moves scattered pages into another pool's scattered pages, re-laid out on the way, and digests them.

It takes addresses, not tensors: the target may be memory of another process or GPU. A work item is one tile's run of
rows that is contiguous on both sides; a bounded number of programs loops over all items, so that few multiprocessors
carry the copy (NVLink takes what 16 or so of them write) and the others stay with the model.

Digest of a set of rows, the same whatever the order, the block size and the program that saw them:

    row(tile, token) = mix(sum over 32-bit words w_c * K_c, xor mix(tile << 32 | token))      all modulo 2^64
    digest           = sum of rows

with odd 64-bit K_c: one changed bit changes its row's sum by 2^b * K_c, never 0, and mix is a bijection, so any single
damaged row is always seen; rows swapped, moved or left as they were are seen but for one chance in 2^64. The sum over
words is the multilinear hash of Lemire and Kaser, "Strongly universal string hashing is fast" (2014).
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kv_transfer.relayout import TileRange

MAX_TILE_WORDS = 4096  # of 32 bits, held by one program at a time


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
    return min(common & -common, max(1, MAX_TILE_WORDS // triton.next_power_of_2(row_bytes // 4)))


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
    tile_words: int = MAX_TILE_WORDS,
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
        num_warps=num_warps,
    )


def total(digests: torch.Tensor) -> int:
    """The digest of what one launch moved: its programs' sums, modulo 2^64."""
    return int(digests.sum()) % 2**64


@triton.jit
def _mix(x):
    """The finalizer of splitmix64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


# Numbers of a launch that say nothing about alignment. Else a variant for each that is 1, or a multiple of 16, would be
# compiled in the middle of a transfer.
_PLAIN = [
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
):
    source = tl.cast(source, tl.pointer_type(tl.int32))
    target = tl.cast(target, tl.pointer_type(tl.int32))
    source_pages = tl.cast(source_pages, tl.pointer_type(tl.int32))
    target_pages = tl.cast(target_pages, tl.pointer_type(tl.int32))
    digests = tl.cast(digests, tl.pointer_type(tl.int64))
    if GUARDED:
        held = tl.load(tl.cast(guard, tl.pointer_type(tl.int64)), volatile=True)
        num_items = tl.where(held == generation, num_items, 0)
    columns = tl.arange(0, COLUMNS)
    keys = _mix((columns.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15) | 1
    row = tl.arange(0, UNITS * UNIT)  # the rows of UNITS items go together
    item = tl.program_id(0) * UNITS + row // UNIT
    seen = tl.zeros((UNITS * UNIT,), tl.uint64)
    first = tl.program_id(0) * UNITS
    while first < num_items:
        here = item < num_items
        tile, token = item % num_tiles, start + item // num_tiles * UNIT + row % UNIT
        part, head = tile // num_heads, tile % num_heads
        inside = here[:, None] & (columns < WORDS)[None, :]
        page = tl.load(source_pages + (token // SOURCE_SIZE - source_first_block), mask=here, other=0).to(tl.int64)
        offset = source_before + (part * source_total + source_first_head + head) * (SOURCE_SIZE * WORDS)
        begin = page * source_block_words + offset + token % SOURCE_SIZE * WORDS
        words = tl.load(source + begin[:, None] + columns[None, :], mask=inside, other=0)
        if PUSH:
            page = tl.load(target_pages + (token // TARGET_SIZE - target_first_block), mask=here, other=0).to(tl.int64)
            offset = target_before + (part * target_total + target_first_head + head) * (TARGET_SIZE * WORDS)
            begin = page * target_block_words + offset + token % TARGET_SIZE * WORDS
            tl.store(target + begin[:, None] + columns[None, :], words, mask=inside)
        if DIGEST:
            sums = tl.sum(words.to(tl.uint32, bitcast=True).to(tl.uint64) * keys[None, :], axis=1)
            position = (first_tile + tile).to(tl.uint64) << 32 | token.to(tl.uint64)
            seen += tl.where(here, _mix(sums ^ _mix(position)), 0)
        item += tl.num_programs(0) * UNITS
        first += tl.num_programs(0) * UNITS
    tl.store(digests + tl.program_id(0), tl.sum(seen, axis=0).to(tl.int64, bitcast=True))
