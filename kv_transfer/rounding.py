"""A pool's KV as a receiver that keeps it in float8 wants it: rounded on the way, as that receiver's engine rounds.

    a layer here [K | V], rows of float32, bfloat16 or float16  ──►  [K | V | scales of K | scales of V]

The rounding is that of engine/fp8.py, which nothing here may import; tests hold the two together over every value that
16 bits can have. A row is rounded by itself, so blocks may differ in size. Between GPUs a kernel rounds as it pushes
(kv_transfer/round_kernel.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby

import numpy as np
import torch

from kv_transfer import staging
from kv_transfer.memory import BlockMemory
from kv_transfer.relayout import TileRange, Tiles, merge


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., dim] -> e4m3 of the same shape, uint8 [...]: the row is e4m3 * 2 ** (scale - 127)."""
    x = x.float()
    bits = x.abs().amax(-1).contiguous().view(torch.int32)
    scale = ((bits + 0x1FFFFF >> 23) - 8).clamp_(1, 253)  # the row's largest becomes more than 224 and at most 448
    power = (254 - scale << 23).view(torch.float32)
    return (x * power[..., None]).to(torch.float8_e4m3fn), scale.to(torch.uint8)


@dataclass(frozen=True, slots=True)
class RoundedMemory(BlockMemory):
    """What leaves a pool: `slab` is the pool's own, the layers are those of the blocks that are sent. Only read."""

    pool: BlockMemory | None = None

    @classmethod
    def of(cls, pool: BlockMemory) -> "RoundedMemory":
        assert pool.dtype is not None and pool.tiles, "rows of unknown elements"
        size = pool.dtype.itemsize
        tiles = tuple(
            (
                *(Tiles(entry.num_tiles, entry.row_bytes // size) for entry in layer),
                Tiles(sum(entry.num_tiles for entry in layer), 1),
            )
            for layer in pool.tiles
        )
        widths = [pool.block_size * sum(entry.num_tiles * entry.row_bytes for entry in layer) for layer in tiles]
        offsets = tuple(accumulate(widths, initial=0))
        return cls(pool.slab, offsets, pool.block_size, tiles, torch.float8_e4m3fn, pool)

    @property
    def rows_dtype(self) -> torch.dtype:
        assert self.pool is not None and self.pool.dtype is not None
        return self.pool.dtype

    def rounded_ranges(self, layer_start: int, layer_stop: int) -> list[tuple[TileRange, TileRange, TileRange]]:
        """Of the pool, and where their values and their scales go in blocks of the receiver."""
        assert self.pool is not None
        rows, sent = (iter(memory.tile_ranges(layer_start, layer_stop)) for memory in (self.pool, self))
        found = []
        for layer, _ in groupby(self.tiles[layer_start:layer_stop]):
            *values, scales = (next(sent) for _ in merge(layer))
            for one in values:
                its = replace(scales, num_tiles=one.num_tiles, part_tiles=one.part_tiles)
                found.append((next(rows), one, its))
                first, before = scales.first_tile + one.part_tiles, scales.before + one.part_tiles
                scales = replace(scales, first_tile=first, before=before)
        return found

    def read(self, block_ids: Sequence[int], layer_start: int, layer_stop: int) -> list[np.ndarray]:
        assert self.pool is not None
        start, stop = self.pool.layer_offsets[layer_start], self.pool.layer_offsets[layer_stop]
        pages, ids = self.slab[:, start:stop], list(block_ids)
        if not pages.is_cuda:
            return [self._rounded(pages[ids], layer_start, layer_stop).numpy().reshape(-1)]
        width = self.width(layer_start, layer_stop)
        staged = torch.empty(len(ids), width, dtype=torch.uint8, pin_memory=True)
        with staging.settled(pages.device, "read"):
            gathered = pages.index_select(0, staging.indices(ids, pages.device))
            staged.copy_(self._rounded(gathered, layer_start, layer_stop), non_blocking=True)
        return [staged.numpy().reshape(-1)]

    def _rounded(self, pages: torch.Tensor, layer_start: int, layer_stop: int) -> torch.Tensor:
        """uint8 [blocks, bytes of the layers] of the pool -> of what is sent."""
        assert self.pool is not None
        parts, at = [], 0
        for layer in self.pool.tiles[layer_start:layer_stop]:
            scales = []
            for entry in layer:
                num_rows = entry.num_tiles * self.block_size
                rows = pages[:, at : at + num_rows * entry.row_bytes].contiguous().view(self.rows_dtype)
                values, scale = quantise(rows.view(len(pages), num_rows, -1))
                parts.append(values.view(torch.uint8).flatten(1))
                scales.append(scale)
                at += num_rows * entry.row_bytes
            parts += scales
        return torch.cat(parts, dim=1)
