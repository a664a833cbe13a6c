"""The same tokens in blocks of two sizes: which rows of one side are which of the other's. Arithmetic, and one copy.

A layer of a block is [K | V], K and V are one tile per kv head, a tile is one row per token of the block:

    block = [tile 0 | tile 1 | ...]      tile = block_size rows of row_bytes

So a block of another size has the same tiles in the same order, each with more or fewer rows; consecutive tokens are
consecutive bytes within a tile. Blocks are logical here: block i of size s holds the tokens [i * s, (i + 1) * s).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

import numpy as np
import torch

Bytes = TypeVar("Bytes", np.ndarray, torch.Tensor)


@dataclass(frozen=True, slots=True)
class Tiles:
    """Consecutive tiles of one row size."""

    num_tiles: int
    row_bytes: int


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive tokens that lie in one block on either side. Rows count from 0 inside the block."""

    source_block: int
    source_row: int
    target_block: int
    target_row: int
    num_rows: int


def runs(start: int, stop: int, source_size: int, target_size: int) -> Iterator[Run]:
    """The tokens [start, stop), in order, cut wherever a block of either side begins."""
    while start < stop:
        source_block, source_row = divmod(start, source_size)
        target_block, target_row = divmod(start, target_size)
        num_rows = min(source_size - source_row, target_size - target_row, stop - start)
        yield Run(source_block, source_row, target_block, target_row, num_rows)
        start += num_rows


def whole_blocks(num_tokens: int, *block_sizes: int) -> int:
    """The most of `num_tokens` that are whole blocks at every size: how far a prefix can be left out of a transfer."""
    unit = math.lcm(*block_sizes)
    return num_tokens // unit * unit


def merge(tiles: Iterable[Tiles]) -> list[Tiles]:
    """Neighbours of one row size joined: a model of equal layers becomes one entry."""
    return [
        Tiles(sum(entry.num_tiles for entry in same), row_bytes)
        for row_bytes, same in groupby(tiles, key=lambda entry: entry.row_bytes)
    ]


@dataclass(frozen=True, slots=True)
class TileRange:
    """Tiles of one row size in a block, so many of each part of it; a part is a layer.

        | K: 2 tiles | V: 2 tiles | scales | K | V | scales | ...        part_tiles 4 of the layer's 8

    In a block of s tokens a tile's offset is s times the bytes per token before it.
    """

    first_tile: int  # counted over the whole block
    num_tiles: int
    row_bytes: int
    before: int  # bytes per token of what lies before the first
    part_tiles: int = 0  # that lie together in a part; 0: all do, in one part
    part_step: int = 0  # tiles from one part's first to the next's
    part_bytes: int = 0  # bytes per token, likewise


def tile_ranges(layers: Sequence[Iterable[Tiles]], layer_start: int, layer_stop: int) -> Iterator[TileRange]:
    """The tiles of layers [layer_start, layer_stop), of a block that consists of `layers`; as few ranges as there are
    row sizes in a run of equal layers."""
    tile = before = 0
    for entry in (entry for layer in layers[:layer_start] for entry in layer):
        tile, before = tile + entry.num_tiles, before + entry.num_tiles * entry.row_bytes
    for layer, run in groupby(layers[layer_start:layer_stop]):
        count, entries = len(list(run)), merge(layer)
        step, width = sum(e.num_tiles for e in entries), sum(e.num_tiles * e.row_bytes for e in entries)
        at_tile, at = tile, before
        for entry in entries:
            tiles = entry.num_tiles
            yield TileRange(at_tile, count * tiles, entry.row_bytes, at, tiles, step, width)
            at_tile, at = at_tile + entry.num_tiles, at + entry.num_tiles * entry.row_bytes
        tile, before = tile + count * step, before + count * width


def copy_rows(
    source: Bytes,
    source_size: int,
    target: Bytes,
    target_size: int,
    tiles: Iterable[Tiles],
    rows: Iterable[Run],
) -> None:
    """Copies `rows` from blocks of one size to blocks of another.

    `source`, `target`: uint8 [blocks, bytes of `tiles`], the last axis contiguous; the runs' blocks are their rows.
    """
    rows = list(rows)
    first = 0  # bytes per token of the tiles so far
    for entry in merge(tiles):
        width, row = entry.num_tiles * entry.row_bytes, entry.row_bytes
        # Cutting the contiguous last axis in two is a view, of a slice too.
        from_tiles = source[:, first * source_size : (first + width) * source_size].reshape(
            len(source), entry.num_tiles, source_size * row
        )
        to_tiles = target[:, first * target_size : (first + width) * target_size].reshape(
            len(target), entry.num_tiles, target_size * row
        )
        for run in rows:
            to_row, from_row, size = run.target_row * row, run.source_row * row, run.num_rows * row
            to_tiles[run.target_block, :, to_row : to_row + size] = from_tiles[
                run.source_block, :, from_row : from_row + size
            ]
        first += width
