"""A one-sided transport for tests: this process writes into the receiver's pool, which it has, on a thread."""

import threading
from dataclasses import dataclass, field

import numpy as np

from kv_transfer.base import BlockMemory, Endpoint, Placement
from kv_transfer.checksum import crc32c
from kv_transfer.one_sided import OneSidedSender
from kv_transfer.placed import Threads
from kv_transfer.rect import Rect


@dataclass
class CpuWriter:
    """Writes when it is waited for, behind the pages' event and its own gate, if the guard says so then."""

    source: BlockMemory
    target: BlockMemory
    guards: np.ndarray
    gate: threading.Event = field(default_factory=threading.Event)
    begun: threading.Event = field(default_factory=threading.Event)
    num_writes: int = 0
    flip: bool = False
    fails: bool = False
    is_instant: bool = True

    def write(self, rect: Rect, placement: Placement) -> "CpuWrite":
        self.num_writes += 1
        if self.fails:
            raise RuntimeError("an unspecified launch failure")
        return CpuWrite(self, rect, placement)


@dataclass
class CpuWrite:
    writer: CpuWriter
    rect: Rect
    placement: Placement

    def wait(self) -> int:
        writer, rect = self.writer, self.rect
        if rect.after is not None:
            rect.after.synchronize()
        writer.begun.set()
        assert writer.gate.wait(10)
        if writer.guards[self.placement.guard] != self.placement.generation:
            return 0
        pages = writer.source.read(rect.block_ids, rect.layer_start, rect.layer_stop)
        target = self.placement.page_ids[rect.block_start : rect.block_start + len(rect.block_ids)]
        writer.target.write(target, rect.layer_start, rect.layer_stop, pages)
        if writer.flip:
            writer.target.slab[target[0], writer.target.layer_offsets[rect.layer_start]] ^= 4
        return crc32c(pages)


class CpuPool:
    """The writer's target as a MappedPool."""

    def __init__(self, writer: CpuWriter, control: str) -> None:
        self.control = control
        self._writer = writer

    def holds(self, placement: Placement) -> bool:
        return all(page < self._writer.target.num_blocks for page in placement.page_ids)

    def writer(self, placement: Placement) -> CpuWriter:
        return self._writer

    def close(self) -> None:
        pass


class CpuSender(OneSidedSender):
    """An endpoint's data is the name of its control socket, or nothing."""

    def __init__(self, transport: str, writer: CpuWriter, source: tuple[str, str], progress_s: float) -> None:
        writer.gate.set()

        def map_pool(endpoint: Endpoint) -> CpuPool:
            return CpuPool(writer, endpoint.data.decode())

        super().__init__(transport, writer.source, source, progress_s, Threads("test"), map_pool)
