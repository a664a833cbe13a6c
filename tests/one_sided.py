"""A one-sided transport for tests: this process writes into the receiver's pool, which it has, on a thread."""

import threading
from dataclasses import dataclass, field

import grpc.aio
import numpy as np

from kv_transfer.base import BlockMemory, Endpoint, Placement
from kv_transfer.checksum import crc32c
from kv_transfer.grpc_stream import GrpcWire
from kv_transfer.placed import PlacedOutgoing, Threads
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


class CpuSender:
    def __init__(self, writer: CpuWriter, source: tuple[str, str], progress_s: float) -> None:
        writer.gate.set()
        self.writer, self.source, self.progress_s = writer, source, progress_s
        self.threads = Threads("test")
        self._links: list[CpuLink] = []

    async def connect(self, address: str, endpoint: Endpoint) -> "CpuLink":
        self._links.append(CpuLink(self, grpc.aio.insecure_channel(address)))
        return self._links[-1]

    async def close(self) -> None:
        for link in self._links:
            await link.close()
        self.threads.close()


class CpuLink:
    transport = "placed"

    def __init__(self, sender: CpuSender, channel: grpc.aio.Channel) -> None:
        self._sender, self._channel = sender, channel
        self._open: set[PlacedOutgoing] = set()

    def open(
        self, transfer_id: bytes, max_chunk_bytes: int | None = None, placement: Placement | None = None
    ) -> PlacedOutgoing:
        assert placement is not None
        sender = self._sender
        wire = GrpcWire(self._channel, transfer_id, sender.source)
        memory, writer, threads = sender.writer.source, sender.writer, sender.threads
        outgoing = PlacedOutgoing(memory, writer, wire, transfer_id, placement, threads, sender.progress_s)
        self._open.add(outgoing)
        outgoing.add_closed_callback(self._open.discard)
        return outgoing

    async def close(self) -> None:
        for outgoing in list(self._open):
            outgoing.abort("the link closes")
            await outgoing.wait_closed()
        await self._channel.close(None)
