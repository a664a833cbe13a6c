"""Senders and links of every two-sided transport: chunks of bytes under a ticket, which the receiver places."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from kv_transfer import local
from kv_transfer.base import Endpoint, ObjectStore, Placement
from kv_transfer.grpc_stream import GrpcWire
from kv_transfer.memory import BlockMemory
from kv_transfer.open_link import OpenLink
from kv_transfer.outgoing import ChunkedOutgoing, Wire
from kv_transfer.ray_store import RayStoreWire
from kv_transfer.rounding import RoundedMemory
from protos.grpc_options import CHANNEL_OPTIONS

MAX_CHUNK_BYTES = 16 << 20  # what a receiver takes

# Up to this much a stream buffers, so that the next chunk is packed while the last ones are written.
_KV_CHANNEL_OPTIONS = [*CHANNEL_OPTIONS, ("grpc.http2.write_buffer_size", 4 << 20)]


class TwoSidedSender:
    def __init__(
        self,
        transport: str,
        memory: BlockMemory,
        source: tuple[str, str],
        object_store: ObjectStore | None,
        max_chunk_bytes: int,
        progress_s: float,
    ) -> None:
        """Raises ValueError for a `max_chunk_bytes` that no chunk can have."""
        _check_chunk_bytes(memory, max_chunk_bytes)
        self.transport = transport
        self.memory = memory
        self.source = source
        self.object_store = object_store
        self.max_chunk_bytes = max_chunk_bytes
        self.progress_s = progress_s
        # A put may wait for room in the store, and one thread copies faster than a receiver takes. What only copies
        # into a message is done at once: a thread costs more than it saves.
        # GPU pages, and those that are rounded, are read by a thread too, while the chunk before is sent.
        is_slow = object_store is not None or memory.slab.is_cuda or isinstance(memory, RoundedMemory)
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="kv-put") if is_slow else None
        self._links: list[_Link] = []

    async def connect(self, address: str, endpoint: Endpoint) -> "_Link":
        self._links.append(_Link(self, address))
        return self._links[-1]

    async def close(self) -> None:
        await asyncio.gather(*(link.close() for link in self._links))
        if self.pool is not None:
            self.pool.shutdown()


class _Link(OpenLink):
    def __init__(self, sender: TwoSidedSender, address: str) -> None:
        super().__init__(sender.transport, address)
        self._sender = sender

    def _start(self, transfer_id: bytes, max_chunk_bytes: int | None, placement: Placement | None) -> ChunkedOutgoing:
        sender = self._sender
        limit = min(sender.max_chunk_bytes, max_chunk_bytes or sender.max_chunk_bytes)
        _check_chunk_bytes(sender.memory, limit)
        return ChunkedOutgoing(sender.memory, self._wire(transfer_id), sender.pool, limit, sender.progress_s)

    def _wire(self, transfer_id: bytes) -> Wire:
        sender = self._sender
        if sender.transport == "local":
            return local.LocalWire(self._address, transfer_id, sender.source)
        channel = self._connected(_KV_CHANNEL_OPTIONS)
        if sender.object_store is not None:
            return RayStoreWire(channel, transfer_id, sender.source, sender.object_store)
        return GrpcWire(channel, transfer_id, sender.source)


def _check_chunk_bytes(memory: BlockMemory, max_chunk_bytes: int) -> None:
    layer = max(memory.width(index, index + 1) for index in range(memory.num_layers))
    if not layer <= max_chunk_bytes <= MAX_CHUNK_BYTES:
        raise ValueError(
            f"max_chunk_bytes {max_chunk_bytes}: must be in [{layer}, {MAX_CHUNK_BYTES}], a layer of a block at least"
        )
