"""Work on scattered pages in GPU memory, launched on a stream of its own beside the model's."""

import functools
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch

from kv_transfer.cuda_driver import copy_to_device
from kv_transfer.cuda_slot import Slots
from kv_transfer.memory import BlockMemory, Pages
from kv_transfer.push_kernel import Side, launch
from kv_transfer.staging import indices, side_stream

# Each program reads a few chunks and ends: what waits for its multiprocessor, a kernel of a decode step, waits for
# microseconds. Together they read 4.4 TB/s: what is left to read when the last bytes have landed is waited for.
PROGRAM_BYTES = 256 << 10
MIN_PROGRAMS, MAX_PROGRAMS = 64, 1024


class PageTables:
    """The page ids of one transfer at its sender: theirs, known from the start, and ours, as they are pushed. On the
    device from the first `fill` on, and kept as long as a stream reads them."""

    def __init__(self, theirs: Sequence[int], num_ours: int, device: torch.device) -> None:
        self._theirs = theirs
        self._first = -(-len(theirs) // 4) * 4  # of ours: 16 bytes, as everything the kernel was compiled for
        self._size = self._first + num_ours
        self._device = device
        self._stream: torch.cuda.Stream | None = None  # that finds theirs, and what is known of ours
        self._uploaded = torch.cuda.Event()
        self._last: tuple[int, Sequence[int]] = (0, ())  # that was filled in

    @property
    def theirs(self) -> int:
        """Address of the page id of logical block 0."""
        return self._table.data_ptr()

    @property
    def ours(self) -> int:
        return self._table.data_ptr() + 4 * self._first

    def fill(self, block_start: int, block_ids: Sequence[int], stream: torch.cuda.Stream) -> None:
        """Our pages of the logical blocks from `block_start` on; they never change. What is launched on `stream` next
        finds them. It is the current stream."""
        if self._stream is None:
            self._staged = torch.empty(self._size, dtype=torch.int32, pin_memory=True)
            self._known = self._staged.numpy()
            self._known[: len(self._theirs)] = self._theirs
            self._known[self._first :] = -1
            self._table = torch.empty(self._size, dtype=torch.int32, device=self._device)
        elif self._stream is not stream:
            stream.wait_event(self._uploaded)
            self._stream = stream
        if self._last == (block_start, block_ids):
            return
        self._last = block_start, block_ids
        start = self._first + block_start
        stop = start + len(block_ids)
        known, new = self._known[start:stop], np.array(block_ids, np.int32)
        if np.array_equal(known, new):
            return
        assert (known == -1).all(), "another page for a block that is on its way"
        known[:] = new
        first = start if self._stream is not None else 0
        target, source = self._table.data_ptr() + 4 * first, self._staged.data_ptr() + 4 * first
        copy_to_device(target, source, 4 * (stop - first), stream)
        self._uploaded.record(stream)
        self._stream = stream


def table(memory: BlockMemory, block_ids: Sequence[int]) -> torch.Tensor:
    """Uploaded behind the digests that are being taken; does not wait."""
    with torch.cuda.stream(side_stream(memory.slab.device, "digest")):
        return indices(block_ids, memory.slab.device, torch.int32)


def first_of_each_shape(layers: Sequence[Any]) -> list[int]:
    """Layers that between them need every variant of the kernel that any layers need."""
    return [index for index, tiles in enumerate(layers) if tiles not in layers[:index]]


def warm_up(memory: BlockMemory) -> None:
    """Compiles what `digests` launches for blocks of our own size."""
    digests(memory, [Pages((0,), 0, layer, layer + 1) for layer in first_of_each_shape(memory.tiles)])


def digests(memory: BlockMemory, pages: Sequence[Pages]) -> list[int]:
    """Of what lies there now, on every program's own account. Blocks."""
    slab, size = memory.slab, memory.block_size
    ranges = [memory.tile_ranges(one.layer_start, one.layer_stop) for one in pages]
    stream, slots = side_stream(slab.device, "digest"), _slots(slab.device)
    held = []
    widths = (len(one.block_ids) * memory.width(one.layer_start, one.layer_stop) for one in pages)
    num_programs = digest_programs(sum(widths))
    with torch.cuda.stream(stream):
        slot = slots.take(sum(map(len, ranges)), num_programs)
        at = slot.address
        for one, found in zip(pages, ranges, strict=True):
            ids = indices(one.block_ids, slab.device, torch.int32) if one.table is None else one.table
            held.append(ids)
            first = one.block_start if one.table is None else 0
            side = Side(slab.data_ptr(), slab.shape[1], size, ids.data_ptr(), first)
            tokens = one.tokens or (one.block_start * size, (one.block_start + len(one.block_ids)) * size)
            for tiles in found:
                launch(side, None, tokens, tiles, at, num_programs)
                at += slot.row_bytes
        slot.done.record(stream)
    slot.done.synchronize()  # polls, for it takes a fraction of a millisecond
    stops = list(accumulate(map(len, ranges), initial=0))
    found_digests = [slot.digest(*rows) for rows in pairwise(stops)]
    slots.give_back(slot)
    return found_digests


def digest_programs(num_bytes: int) -> int:
    """That read so much."""
    return min(max(num_bytes // PROGRAM_BYTES, MIN_PROGRAMS), MAX_PROGRAMS)


@functools.cache
def _slots(device: torch.device) -> Slots:
    return Slots(device, MAX_PROGRAMS)
