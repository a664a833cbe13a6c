"""Work on scattered pages in GPU memory, launched on a stream of its own beside the model's."""

from collections.abc import Sequence
from typing import Any

import torch

from kv_transfer.memory import BlockMemory, Pages
from kv_transfer.push_kernel import Side, launch, total
from kv_transfer.relayout import tile_ranges
from kv_transfer.staging import indices, settled

DIGEST_PROGRAMS = 64  # about half of an H100's multiprocessors, for the fraction of a millisecond that a digest takes


def page_ids(block_ids: Sequence[int], device: torch.device) -> torch.Tensor:
    """As the kernel reads them."""
    return indices(block_ids, device, torch.int32)


def first_of_each_shape(layers: Sequence[Any]) -> list[int]:
    """Layers that between them need every variant of the kernel that any layers need."""
    return [index for index, tiles in enumerate(layers) if tiles not in layers[:index]]


def warm_up(memory: BlockMemory) -> None:
    """Compiles what `digests` launches for blocks of our own size."""
    digests(memory, [Pages((0,), 0, layer, layer + 1) for layer in first_of_each_shape(memory.tiles)])


def digests(memory: BlockMemory, pages: Sequence[Pages]) -> list[int]:
    """Of what lies there now, on every program's own account. Blocks."""
    device, size = memory.slab.device, memory.block_size
    ranges = [list(tile_ranges(memory.tiles, one.layer_start, one.layer_stop)) for one in pages]
    sums = torch.empty(sum(map(len, ranges)), DIGEST_PROGRAMS, dtype=torch.int64, pin_memory=True)
    slots = iter(sums)
    with settled(device, "digest"):
        held = []
        for one, found in zip(pages, ranges, strict=True):
            held.append(page_ids(one.block_ids, device))
            side = Side(memory.slab.data_ptr(), memory.slab.shape[1], size, held[-1].data_ptr(), one.block_start)
            tokens = one.tokens or (one.block_start * size, (one.block_start + len(one.block_ids)) * size)
            for tiles in found:
                launch(side, None, tokens, tiles, next(slots).data_ptr(), DIGEST_PROGRAMS)
    results, at = [], 0
    for found in ranges:
        results.append(total(sums[at : at + len(found)]))
        at += len(found)
    return results
