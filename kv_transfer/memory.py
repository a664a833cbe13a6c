"""A pool of KV blocks as transports see it: rows of bytes with a table of layer offsets."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import torch

from kv_transfer import staging
from kv_transfer.checksum import copy_crc32c, crc32c
from kv_transfer.relayout import TileRange, Tiles, copy_rows, runs, tile_ranges


@dataclass(frozen=True, slots=True)
class Pages:
    """Some layers of consecutive logical blocks, or of some of their tokens."""

    block_ids: Sequence[int]  # in a pool
    block_start: int  # logical number of the first
    layer_start: int
    layer_stop: int
    tokens: tuple[int, int] | None = None  # [start, stop) of the logical blocks' tokens, None: all
    table: torch.Tensor | None = None  # of all logical blocks from 0 on (BlockMemory.table)


@dataclass(frozen=True, slots=True)
class BlockMemory:
    """All blocks of one worker.

        block_id ──►  | layer 0 | layer 1 | ... | layer L-1 | (padding)
                      ^offsets[0]  ^offsets[1]              ^offsets[L]

    CPU pages are read and written in place; CUDA pages are staged through pinned host memory a chunk at a time, on
    streams that do not wait for the model's, so whoever pushes them has waited for the kernels that wrote them.
    """

    slab: torch.Tensor  # uint8 [num_blocks, block_bytes]
    layer_offsets: tuple[int, ...]  # L + 1 byte offsets inside a block, ascending from 0
    block_size: int = 0  # tokens per block; 0: unknown, and then peers' blocks must be alike
    tiles: tuple[tuple[Tiles, ...], ...] = ()  # of each layer, where block_size is known
    dtype: torch.dtype | None = None  # of the rows' elements; None: unknown, and then no receiver gets them rounded
    _ranges: dict[tuple[int, int], list[TileRange]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.slab.dtype != torch.uint8 or self.slab.dim() != 2 or not self.slab.is_contiguous():
            raise ValueError(
                f"slab is {self.slab.dtype} {tuple(self.slab.shape)}: must be contiguous uint8 [blocks, bytes]"
            )
        offsets = self.layer_offsets
        ascending = all(a < b for a, b in pairwise(offsets))
        if len(offsets) < 2 or offsets[0] != 0 or not ascending or offsets[-1] > self.slab.shape[1]:
            raise ValueError(
                f"layer_offsets {offsets}: must ascend from 0 to at most block_bytes = {self.slab.shape[1]}"
            )
        widths = [sum(entry.num_tiles * entry.row_bytes for entry in layer) for layer in self.tiles]
        if self.block_size and [width * self.block_size for width in widths] != np.diff(offsets).tolist():
            raise ValueError(f"tiles of {widths} bytes a token in blocks of {self.block_size} are no {offsets}")

    @property
    def num_blocks(self) -> int:
        return self.slab.shape[0]

    @property
    def num_layers(self) -> int:
        return len(self.layer_offsets) - 1

    def width(self, layer_start: int, layer_stop: int, block_size: int = 0) -> int:
        """Bytes of layers [layer_start, layer_stop) of one block, ours or one of `block_size` tokens."""
        width = self.layer_offsets[layer_stop] - self.layer_offsets[layer_start]
        return width // self.block_size * block_size if block_size else width

    def tile_ranges(self, layer_start: int, layer_stop: int) -> list[TileRange]:
        """What a kernel moves of these layers, a launch each."""
        found = self._ranges.get((layer_start, layer_stop))
        if found is None:
            found = self._ranges[layer_start, layer_stop] = list(tile_ranges(self.tiles, layer_start, layer_stop))
        return found

    def table(self, block_ids: Sequence[int]) -> torch.Tensor | None:
        """Page ids that `digests` finds on the GPU, so that it need not bring them; None on a CPU."""
        if not self.slab.is_cuda or not self.tiles:
            return None
        from kv_transfer.cuda_pages import table

        return table(self, block_ids)

    def read(self, block_ids: Sequence[int], layer_start: int, layer_stop: int) -> list[np.ndarray]:
        """The layers' bytes, block after block: views of the pages on CPU, one staged copy on CUDA."""
        start, stop = self.layer_offsets[layer_start], self.layer_offsets[layer_stop]
        if self.slab.is_cuda:
            return [staging.read(self.slab[:, start:stop], block_ids)]
        pages = self.slab.numpy()
        return [pages[block_id, start:stop] for block_id in block_ids]

    def digests(self, pages: Sequence[Pages]) -> list[int]:
        """Of what lies in the pages now: the digest that a one-sided writer takes of what it reads. Blocks until it is
        known. The same for blocks of any size on a GPU; on a CPU of whole blocks only, their crc32c."""
        if self.slab.is_cuda:
            from kv_transfer.cuda_pages import digests  # Triton is not everywhere

            return digests(self, pages)
        assert all(one.tokens is None for one in pages)
        return [crc32c(self.read(one.block_ids, one.layer_start, one.layer_stop)) for one in pages]

    def write(self, block_ids: Sequence[int], layer_start: int, layer_stop: int, arrays: Sequence[np.ndarray]) -> int:
        """Writes `arrays`, laid end to end, over the layers of the blocks; the total must fit exactly. Returns the
        crc32c of what was written."""
        start, stop = self.layer_offsets[layer_start], self.layer_offsets[layer_stop]
        width = stop - start
        if self.slab.is_cuda:
            staged = staging.pinned(arrays)
            staging.write(self.slab[:, start:stop], block_ids, staged)
            return crc32c([staged.numpy()])
        pages = self.slab.numpy()
        block, filled, checksum = 0, 0, 0  # block and byte of it where the next byte goes
        for array in arrays:
            at = 0
            while at < len(array):
                size = min(width - filled, len(array) - at)
                page = pages[block_ids[block], start + filled : start + filled + size]
                checksum = copy_crc32c(array[at : at + size], page, checksum)
                at, filled = at + size, filled + size
                if filled == width:
                    block, filled = block + 1, 0
        assert block == len(block_ids) and filled == 0
        return checksum

    def write_anew(
        self,
        block_ids: Sequence[int],
        block_start: int,
        block_size: int,
        layer_start: int,
        layer_stop: int,
        arrays: Sequence[np.ndarray],
    ) -> int:
        """Lays blocks of another size anew: `arrays`, laid end to end, are the layers of the logical blocks of
        `block_size` tokens from `block_start` on. `block_ids` are the pages of our logical blocks 0, 1, ...; tokens
        behind the last of them, which a partly filled block may have, are left out. Returns the crc32c of `arrays`."""
        source = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        checksum = crc32c([source])
        source = source.reshape(-1, self.width(layer_start, layer_stop, block_size))
        stop = min((block_start + len(source)) * block_size, len(block_ids) * self.block_size)
        rows = [
            replace(run, source_block=run.source_block - block_start, target_block=block_ids[run.target_block])
            for run in runs(block_start * block_size, stop, block_size, self.block_size)
        ]
        tiles = [entry for layer in self.tiles[layer_start:layer_stop] for entry in layer]
        target = self.slab[:, self.layer_offsets[layer_start] : self.layer_offsets[layer_stop]]
        if self.slab.is_cuda:
            with staging.settled(self.slab.device, "write"):
                staged = torch.from_numpy(source).to(self.slab.device)
                copy_rows(staged, block_size, target, self.block_size, tiles, rows)
        else:
            copy_rows(source, block_size, target.numpy(), self.block_size, tiles, rows)
        return checksum
